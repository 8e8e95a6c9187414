# augself_mocov3_vits16.py on the policy of AugSelf's authors for ImageNet100, which is that of the
# AugSelf row in SER's comparison: stronger saturation, blur in half of both views, no solarize.
_base_ = ['augself_mocov3_vits16.py']

jitter = dict(type='FastColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
view = [
    _base_.crop,
    dict(type='RandomApply', transforms=[jitter], prob=0.8),
    _base_.color[1],
    dict(**_base_.blur, prob=0.5),
    _base_.flip,
]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[view, view])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
