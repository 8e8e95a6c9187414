# MoCo v3 at toy scale, on crops of bundled pictures: the baseline of ser_mocov3.py.
_base_ = ['../_base_/default_runtime.py']

data_preprocessor = dict(
    type='SelfSupDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

# The crops are grey, so the photometric policy has no colour to change.
crop = dict(type='RandomResizedCrop', scale=48, crop_ratio_range=(0.2, 1.0))
flip = dict(type='RandomFlip', prob=0.5)
jitter = dict(
    type='RandomApply',
    transforms=[dict(type='ColorJitter', brightness=0.4, contrast=0.4)],
    prob=0.8,
)
blur = dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf')
photometry1 = [jitter, dict(**blur, prob=1.0)]
photometry2 = [jitter, dict(**blur, prob=0.1), dict(type='Solarize', thr=128, prob=0.2)]
view_pipeline1 = [crop, *photometry1, flip]
view_pipeline2 = [crop, *photometry2, flip]
# A further view of some configs: a local crop, or the crop that E-SSL turns.
small_crop = [dict(crop, scale=24, crop_ratio_range=(0.05, 0.25)), jitter, flip]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiView', num_views=[1, 1], transforms=[view_pipeline1, view_pipeline2]),
    dict(type='PackInputs'),
]
eval_pipeline = [
    dict(type='LoadReadableImage', skip=False),
    dict(type='CenterCrop', crop_size=48),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='BundledPhotos', split='train', pipeline=train_pipeline),
)
# What probes and the other evaluations look at.
evaluation = dict(
    train=dict(type='BundledPhotos', split='train', pipeline=eval_pipeline),
    val=dict(type='BundledPhotos', split='val', pipeline=eval_pipeline),
)

# What MMPretrain's FeatureExtractor reads, which knows one way of loading. Nothing is tested while
# pretraining.
test_dataloader = dict(
    dataset=dict(evaluation['val'], pipeline=[dict(type='LoadImageFromFile'), *eval_pipeline[1:]])
)
test_cfg = dict()
test_evaluator = []

norm_cfg = dict(type='BN1d')
temperature = 0.2
model = dict(
    type='MoCoV3',
    base_momentum=0.05,
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='SERVisionTransformer',
        arch=dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=192),
        img_size=48,
        patch_size=8,
        stop_grad_conv1=True,
    ),
    neck=dict(
        type='NonLinearNeck',
        in_channels=96,
        hid_channels=256,
        out_channels=128,
        num_layers=3,
        with_last_bn_affine=False,
        with_avg_pool=False,
        norm_cfg=norm_cfg,
    ),
    head=dict(
        type='MoCoV3Head',
        predictor=dict(
            type='NonLinearNeck',
            in_channels=128,
            hid_channels=256,
            out_channels=128,
            num_layers=2,
            with_last_bn_affine=False,
            with_avg_pool=False,
            norm_cfg=norm_cfg,
        ),
        loss=dict(type='CrossEntropyLoss', loss_weight=2 * temperature),
        temperature=temperature,
    ),
)

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.1))
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-4,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=1,
        end=8,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=8)

default_hooks = dict(logger=dict(interval=5), checkpoint=dict(max_keep_ckpts=2))
log_processor = dict(window_size=10)
