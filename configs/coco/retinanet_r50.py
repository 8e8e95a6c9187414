# RetinaNet, 1x, on a frozen ResNet-50; its weights: model.backbone.init_cfg.checkpoint.
_base_ = ['_base_/frozen_r50.py', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

model = dict(backbone=_base_.backbone)
optim_wrapper = _base_.frozen_apart

train_pipeline = _base_.read_image + _base_.train_pipeline[1:]
test_pipeline = _base_.read_image + _base_.test_pipeline[1:]
tta_pipeline = _base_.read_image + _base_.tta_pipeline[1:]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
default_hooks = _base_.hooks
