# MoCo v3 + STL at toy scale: what differs from mocov3.py is all in this file.
_base_ = ['mocov3.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='STLHead', trans_weight=0.1),
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=0, pair_draws=True)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
