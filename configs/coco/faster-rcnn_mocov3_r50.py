# Faster R-CNN, 1x, on a frozen ResNet-50 pretrained by mocov3_r50.py.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '_base_/frozen_r50.py']

model = dict(backbone=_base_.backbone)
optim_wrapper = _base_.frozen_apart
