# Barlow Twins, ResNet-50 + SER: what differs from barlowtwins_r50.py is all in this file.
_base_ = ['barlowtwins_r50.py']

algorithm = _base_.model
algorithm.backbone.update(ser_layer=3)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    head=dict(type='SERHead', temperature=0.4),
    loss_weight=1.0,  # docs/results: little beside the loss of Barlow Twins
)

# The projector's LayerNorm, as all norms.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'ser_neck.layers.0': _base_.excluded}))

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=0.01)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
