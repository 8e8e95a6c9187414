# RetinaNet, 1x, on a frozen ViT-S/16; its weights: model.backbone.init_cfg.checkpoint.
_base_ = ['_base_/frozen_vits16.py', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

model = dict(
    backbone=dict(_delete_=True, **_base_.backbone),
    # RetinaNet has strides 8 to 128.
    neck=dict(_delete_=True, **_base_.neck, scale_factors=(2, 1, 0.5)),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
