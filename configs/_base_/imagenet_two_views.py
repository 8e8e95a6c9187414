# ImageNet-1k, two views at 224 x 224: the policy of MoCo v3 and BYOL.
# data/imagenet/train/<wordnet id>/*.JPEG
_base_ = ['imagenet_evaluation.py']

data_preprocessor = dict(
    type='SelfSupDataPreprocessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
    non_blocking=True,
)

# MMPretrain's transforms, of the same law and draws, on faster functions; their names without Fast
# do as well.
crop = dict(type='FastRandomResizedCrop', scale=224, crop_ratio_range=(0.08, 1.0), backend='pillow')
flip = dict(type='FastRandomFlip', prob=0.5)
color = [
    dict(
        type='RandomApply',
        transforms=[
            dict(type='FastColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        ],
        prob=0.8,
    ),
    dict(
        type='FastRandomGrayscale',
        prob=0.2,
        keep_channels=True,
        channel_weights=(0.114, 0.587, 0.2989),
    ),
]
blur = dict(type='FastGaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf')
photometry1 = [*color, dict(**blur, prob=1.0)]
photometry2 = [*color, dict(**blur, prob=0.1), dict(type='FastSolarize', thr=128, prob=0.2)]
view_pipeline1 = [crop, *photometry1, flip]
view_pipeline2 = [crop, *photometry2, flip]
# Further views of some configs: local crops as in SER's release, without grayscale; the crop that
# E-SSL turns, as in its authors' code.
small = dict(crop, scale=96)
local_crop = [dict(small, crop_ratio_range=(0.05, 0.25)), color[0], dict(**blur, prob=0.5), flip]
turned_crop = [dict(small, crop_ratio_range=(0.05, 0.14)), *color, dict(**blur, prob=0.1), flip]

train_pipeline = [
    dict(type='LoadReadableImage'),
    dict(type='FastMultiView', num_views=[1, 1], transforms=[view_pipeline1, view_pipeline2]),
    dict(type='FastPackInputs'),
]
train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=False,
    worker_init_fn=dict(type='keep_worker_seed'),
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    # Any folder of images does: labels are not looked at.
    dataset=dict(
        type='CustomDataset',
        data_root='data/imagenet/',
        data_prefix='train',
        with_label=False,
        pipeline=train_pipeline,
    ),
)

# What MMPretrain's FeatureExtractor reads, which knows one way of loading. Nothing is tested while
# pretraining.
test_dataloader = dict(
    dataset=dict(
        _base_.evaluation.val,
        pipeline=[dict(type='LoadImageFromFile'), *_base_.eval_pipeline[1:]],
    )
)
test_cfg = dict()
test_evaluator = []
