# MoCo v3, ViT-S/16, ImageNet-1k, 100 epochs, 8 x 256 images: the baseline of ser_mocov3_vits16.py.
_base_ = [
    '_base_/imagenet_two_views.py',
    '_base_/schedule_100e.py',
    '_base_/default_runtime.py',
]

norm_cfg = dict(type='BN1d')
temperature = 0.2
model = dict(
    type='MoCoV3',
    base_momentum=0.01,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='SERVisionTransformer',
        arch='deit-small',
        img_size=224,
        patch_size=16,
        stop_grad_conv1=True,
    ),
    neck=dict(
        type='NonLinearNeck',
        in_channels=384,
        hid_channels=4096,
        out_channels=256,
        num_layers=3,
        with_last_bn_affine=False,
        with_avg_pool=False,
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
            with_last_bn_affine=False,
            with_avg_pool=False,
            norm_cfg=norm_cfg,
        ),
        loss=dict(type='CrossEntropyLoss', loss_weight=2 * temperature),
        temperature=temperature,
    ),
)

# 3e-4 per 256 images; --auto-scale-lr adapts it to another global batch.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=2.4e-3, weight_decay=0.1),
)
auto_scale_lr = dict(base_batch_size=2048)
