# A small Mask R-CNN for handwritten digits on photographs, on a frozen backbone pretrained by
# another config of this folder: tools/demo_detection.py takes model.backbone from there.
_base_ = ['../coco/mask-rcnn_vits16.py']

strides = [4, 8, 16, 32]  # of a patch of 8
roi_extractor = dict(out_channels=64, featmap_strides=strides, finest_scale=28)
model = dict(
    neck=dict(in_channels=96, out_channels=64, scale_factors=(2, 1, 0.5), num_outs=4),
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=strides)
    ),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(num_convs=1, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)

data_root = 'data/bundled_digits/'
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
train_pipeline[3].scale = test_pipeline[2].scale = (160, 160)
train_pipeline.pop(4)  # the mirror image of a digit is none
common = dict(data_root=data_root, metainfo=dict(classes=tuple('0123456789')))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **common, ann_file='train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **common, ann_file='val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_epochs=6, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        T_max=6,
        by_epoch=True,
        begin=0,
        end=6,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(logger=dict(interval=10))
