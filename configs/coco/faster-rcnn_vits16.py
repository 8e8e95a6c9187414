# Faster R-CNN, 1x, on a frozen ViT-S/16; its weights: model.backbone.init_cfg.checkpoint.
_base_ = ['_base_/frozen_vits16.py', 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py']

model = dict(
    backbone=dict(_delete_=True, **_base_.backbone),
    neck=dict(_delete_=True, **_base_.neck),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)

train_pipeline = _base_.read_image + _base_.train_pipeline[1:]
test_pipeline = _base_.read_image + _base_.test_pipeline[1:]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
default_hooks = _base_.hooks
