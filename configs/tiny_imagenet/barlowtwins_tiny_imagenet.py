# Barlow Twins on Tiny ImageNet: the baseline of ser_barlowtwins_tiny_imagenet.py.
_base_ = ['mocov3_tiny_imagenet.py']

model = dict(
    _delete_=True,
    type='BarlowTwins',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False),
    neck=dict(
        type='NonLinearNeck',
        in_channels=192,
        hid_channels=2048,
        out_channels=2048,
        num_layers=3,
        with_last_bn=False,
        with_avg_pool=False,
        norm_cfg=_base_.norm_cfg,
    ),
    head=dict(
        type='CrossCorrelationHead',
        in_channels=2048,
        loss=dict(type='CrossCorrelationLoss', lambd=0.0051),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=0.3))
