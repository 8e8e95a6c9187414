# Tiny ImageNet, 64 x 64 pixels, two views of 64 tokens, all of it made on the device.
# data/tiny-imagenet-200/{train,val,wnids.txt}
_base_ = ['default_runtime.py']

# MoCo v3's policy without blur, and with crops of a fifth of the image or more: at 64 pixels there
# is little left to blur or to cut out.
crop = dict(
    type='RandomResizedCrop',
    scale=64,
    crop_ratio_range=(0.2, 1.0),
    backend='pillow',
    interpolation='bicubic',
)
flip = dict(type='RandomFlip', prob=0.5)
color = [
    dict(
        type='RandomApply',
        transforms=[
            dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        ],
        prob=0.8,
    ),
    dict(
        type='RandomGrayscale',
        prob=0.2,
        keep_channels=True,
        channel_weights=(0.114, 0.587, 0.2989),
    ),
]
solarize = dict(type='Solarize', thr=128, prob=0.2)
pixels = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
data_preprocessor = dict(
    type='SERDataPreprocessor',
    **pixels,
    views=[[crop, *color, flip], [crop, *color, solarize, flip]],
)

load = dict(type='LoadImageFromFile')
eval_pipeline = [load, dict(type='PackInputs')]
# What probes and the other evaluations look at.
evaluation = {
    split: dict(type='TinyImageNet', split=split, pipeline=eval_pipeline)
    for split in ('train', 'val')
}
train_dataloader = dict(
    batch_size=512,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='CachedImages',
        dataset=dict(type='TinyImageNet', split='train', pipeline=[load]),
        pipeline=[dict(type='PackInputs')],
    ),
)

# What MMPretrain's FeatureExtractor reads. Nothing is tested while pretraining.
test_dataloader = dict(dataset=evaluation['val'])
test_cfg = dict()
test_evaluator = []

backbone = dict(
    type='SERVisionTransformer',
    arch=dict(embed_dims=192, num_layers=9, num_heads=3, feedforward_channels=768),
    img_size=64,
    patch_size=8,
)

default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=1))
