# Faster R-CNN on a frozen ViT for Tiny ImageNet: one box an image, from the annotation files that
# `ser-mm boxes data/tiny-imagenet-200 data/tiny-imagenet-boxes --train 15 --val 5` writes.
# What is measured is localization: all boxes are of one class, 'object'. Telling 200 classes apart
# takes more steps than these, whatever the backbone; `ser-mm boxes --all-classes` is for that.
_base_ = ['../coco/faster-rcnn_vits16.py']

strides = [4, 8, 16, 32]  # of a patch of 8
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=384
        ),
        img_size=64,
        patch_size=8,
        cls_layer=2,  # 0 for weights with [CLS] from the input
        frozen_stages=6,
        init_cfg=dict(checkpoint='work_dirs/ser_mocov3_tiny_imagenet_short/epoch_2.pth'),
    ),
    neck=dict(in_channels=96, out_channels=64, scale_factors=(2, 1, 0.5), num_outs=4),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        # Of 8 to 128 pixels: objects of images of 64 as they are, and scaled to 128.
        anchor_generator=dict(scales=[2, 4], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, featmap_strides=strides, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=1),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=100, max_per_img=50),
        rcnn=dict(sampler=dict(num=16)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)),
)

train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[3].scale = test_pipeline[2].scale = (64, 64)  # (128, 128) is the other measure
common = dict(
    data_root='',
    data_prefix=dict(img='data/tiny-imagenet-200/'),
    metainfo=dict(classes=('object',)),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**common, ann_file='data/tiny-imagenet-boxes/train.json', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**common, ann_file='data/tiny-imagenet-boxes/val.json', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/tiny-imagenet-boxes/val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=2,
        by_epoch=True,
        begin=0,
        end=2,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10))
