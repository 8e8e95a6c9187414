# stl_mocov3_vits16.py on the policy of SER's release for STL: every image is squashed to a square,
# crops are no smaller than a fifth of it, blur in half of both views, no solarize.
_base_ = ['stl_mocov3_vits16.py']

view = [
    dict(type='Resize', scale=(224, 224)),
    dict(_base_.crop, crop_ratio_range=(0.2, 1.0)),
    *_base_.color,
    dict(**_base_.blur, prob=0.5),
    _base_.flip,
]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[view, view])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
