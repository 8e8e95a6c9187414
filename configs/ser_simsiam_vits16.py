# SimSiam + SER, ViT-S/16, with the schedule of MoCo v3: a start, not a tuned recipe.
_base_ = ['ser_mocov3_vits16.py', '_base_/latent_prediction.py']

algorithm = dict(
    _delete_=True,
    type='SimSiam',
    data_preprocessor=_base_.data_preprocessor,
    backbone=_base_.algorithm.backbone,
    neck=dict(_base_.algorithm.neck, **_base_.simsiam_neck),
    head=_base_.simsiam_head,
)
model = dict(algorithm=algorithm)
