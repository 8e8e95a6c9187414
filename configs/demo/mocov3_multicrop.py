# MoCo v3 with four local crops in its own loss, at toy scale.
_base_ = ['mocov3.py']

model = dict(type='MultiCropMoCoV3')

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    num_views=[1, 1, 4],
    transforms=[_base_.view_pipeline1, _base_.view_pipeline2, _base_.small_crop],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
