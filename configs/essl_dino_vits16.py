# DINO + E-SSL on the final [CLS] token, as its authors have it: a small crop of each image
# in four quarter turns beside the views of dino_vits16.py. Its control has
# model.loss_weight=0. The weight is that of SER's release; the authors have no DINO.
_base_ = ['dino_vits16.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='RotationHead', hid_channels=256),
    loss_weight=0.3,
)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    type='EquivariantViewPipeline', equi_ratio=0, extra_views=[_base_.turned_crop]
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
