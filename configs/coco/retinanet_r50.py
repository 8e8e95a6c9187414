# RetinaNet, 1x, on a frozen ResNet-50; its weights: model.backbone.init_cfg.checkpoint.
_base_ = ['_base_/frozen_r50.py', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

model = dict(backbone=_base_.backbone)
optim_wrapper = _base_.frozen_apart
