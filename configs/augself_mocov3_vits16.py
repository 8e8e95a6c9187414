# MoCo v3 + AugSelf on the final [CLS] token, as its authors have it, on the policy of
# mocov3_vits16.py. Its control, at model.loss_weight=0, is mocov3_vits16.py itself.
_base_ = ['mocov3_vits16.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='AugSelfHead', weights=dict(crop=0.5, color=0.5)),
    loss_weight=1.0,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=0, record_draws=True)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
