# MoCo v3 + STL on the final [CLS] token, as its authors have it, on the policy of
# mocov3_vits16.py, whose draws images share two by two. Its control has model.loss_weight=0.
# trans_weight: 0.1 in the authors' code, 0.2 in their paper.
_base_ = ['mocov3_vits16.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='STLHead', trans_weight=0.1, temperature=0.2),
    loss_weight=1.0,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(type='EquivariantViewPipeline', equi_ratio=0, pair_draws=True)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
