# MoCo v3 with four local crops in its own loss (2 + 4 views): the baseline of
# ser_mocov3_vits16_multicrop.py, and a control of essl_mocov3_vits16.py.
_base_ = ['mocov3_vits16.py']

model = dict(type='MultiCropMoCoV3')

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    num_views=[1, 1, 4],
    transforms=[_base_.view_pipeline1, _base_.view_pipeline2, _base_.local_crop],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
