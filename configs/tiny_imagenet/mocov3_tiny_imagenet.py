# MoCo v3 on Tiny ImageNet, a ViT of 192 x 9 on 64 tokens: the baseline of
# ser_mocov3_tiny_imagenet.py.
_base_ = ['../_base_/tiny_imagenet.py', '../_base_/schedule_100e.py']

width = _base_.backbone.arch.embed_dims
norm_cfg = dict(type='BN1d')
temperature = 0.2
model = dict(
    type='MoCoV3',
    base_momentum=0.01,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.backbone, stop_grad_conv1=True),
    neck=dict(
        type='NonLinearNeck',
        in_channels=width,
        hid_channels=1024,
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
            hid_channels=1024,
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

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.1),
)
