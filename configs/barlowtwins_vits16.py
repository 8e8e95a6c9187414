# Barlow Twins, ViT-S/16, ImageNet-1k, 100 epochs, 8 x 256 images: the baseline of
# ser_barlowtwins_vits16.py.
_base_ = [
    '_base_/imagenet_two_views.py',
    '_base_/schedule_100e.py',
    '_base_/default_runtime.py',
]

crop = dict(_base_.crop, interpolation='bicubic')
view_pipeline1 = [crop, *_base_.photometry1, _base_.flip]
view_pipeline2 = [crop, *_base_.photometry2, _base_.flip]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[view_pipeline1, view_pipeline2])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

model = dict(
    type='BarlowTwins',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='SERVisionTransformer',
        arch='deit-small',
        img_size=224,
        patch_size=16,
        linear_init='trunc_normal',
    ),
    neck=dict(
        type='NonLinearNeck',
        in_channels=384,
        hid_channels=8192,
        out_channels=8192,
        num_layers=3,
        with_last_bn=False,
        with_avg_pool=False,
        norm_cfg=dict(type='BN1d'),
    ),
    head=dict(
        type='CrossCorrelationHead',
        in_channels=8192,
        loss=dict(type='CrossCorrelationLoss', lambd=0.0051),
    ),
)

# 1e-4 per 256 images; --auto-scale-lr adapts it to another global batch.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=8e-4, weight_decay=0.1),
    clip_grad=dict(max_norm=0.3),
)
auto_scale_lr = dict(base_batch_size=2048)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(eta_min_ratio=0.001)
