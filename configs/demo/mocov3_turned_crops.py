# MoCo v3 with the crop of essl_mocov3.py, in its four turns, in its own loss, at toy scale.
_base_ = ['mocov3.py']

model = dict(type='MultiCropMoCoV3', turn_crops=True)

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    num_views=[1, 1, 1],
    transforms=[_base_.view_pipeline1, _base_.view_pipeline2, _base_.small_crop],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
