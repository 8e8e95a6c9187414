# MoCo v3 with four local crops + SER: what differs from mocov3_vits16_multicrop.py is here.
_base_ = ['mocov3_vits16_multicrop.py']

algorithm = _base_.model
algorithm.backbone.update(ser_layer=3)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    head=dict(type='SERHead', temperature=0.5),
    loss_weight=1.0,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=0.01)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
