# MoCo v3 + EquiMod at toy scale: what differs from mocov3.py is all in this file.
_base_ = ['mocov3.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='EquiModHead', hid_channels=256),  # as the projector of mocov3.py
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    type='EquivariantViewPipeline',
    equi_ratio=0,
    record_draws=True,
    extra_views=[[dict(type='CenterCrop', crop_size=48)]],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
