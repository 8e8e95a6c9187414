# MoCo v3 with four local crops + SER at toy scale: what differs from mocov3_multicrop.py is here.
_base_ = ['mocov3_multicrop.py']

algorithm = _base_.model
algorithm.backbone.update(ser_layer=2)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    neck=dict(type='SERNeck', hid_channels=128, out_channels=128),
    head=dict(type='SERHead', temperature=0.4),
    loss_weight=1.0,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=1 / 8)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
