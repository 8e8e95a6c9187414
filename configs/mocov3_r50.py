# MoCo v3, ResNet-50, ImageNet-1k, 100 epochs, 8 x 256 images: the baseline of ser_mocov3_r50.py.
# MMPretrain's recipe (mocov3_resnet50_8xb512-amp-coslr-100e_in1k) at half its batch.
_base_ = [
    '_base_/imagenet_two_views.py',
    '_base_/schedule_100e.py',
    '_base_/default_runtime.py',
]

crop = dict(_base_.crop, crop_ratio_range=(0.2, 1.0))
view_pipeline1 = [crop, *_base_.photometry1, _base_.flip]
view_pipeline2 = [crop, *_base_.photometry2, _base_.flip]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[view_pipeline1, view_pipeline2])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

norm_cfg = dict(type='BN1d')
temperature = 1.0
model = dict(
    type='MoCoV3',
    base_momentum=0.01,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(type='SERResNet', depth=50, zero_init_residual=False),
    neck=dict(
        type='NonLinearNeck',
        in_channels=2048,
        hid_channels=4096,
        out_channels=256,
        num_layers=2,
        with_last_bn_affine=False,
        with_avg_pool=True,
        norm_cfg=norm_cfg,
    ),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(
            type='NonLinearNeck',
            in_channels=256,
            hid_channels=4096,
            out_channels=256,
            num_layers=2,
            with_last_bn=False,
            with_avg_pool=False,
            norm_cfg=norm_cfg,
        ),
        loss=dict(type='CrossEntropyLoss', loss_weight=2 * temperature),
        temperature=temperature,
    ),
)

# 0.6 per 256 images; --auto-scale-lr adapts it to another global batch.
excluded = dict(decay_mult=0, lars_exclude=True)
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='LARS', lr=4.8, momentum=0.9, weight_decay=1e-6),
    paramwise_cfg=dict(
        custom_keys={'bn': excluded, 'bias': excluded, 'downsample.1': excluded},
    ),
)
auto_scale_lr = dict(base_batch_size=2048)
