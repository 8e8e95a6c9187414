# Barlow Twins at toy scale, on the data and schedule of mocov3.py: the baseline of
# ser_barlowtwins.py.
_base_ = ['mocov3.py']

model = dict(
    _delete_=True,
    type='BarlowTwins',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False),
    neck=dict(
        type='NonLinearNeck',
        in_channels=96,
        hid_channels=512,
        out_channels=512,
        num_layers=3,
        with_last_bn=False,
        with_avg_pool=False,
        norm_cfg=_base_.norm_cfg,
    ),
    head=dict(
        type='CrossCorrelationHead',
        in_channels=512,
        loss=dict(type='CrossCorrelationLoss', lambd=0.0051),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=0.3))
