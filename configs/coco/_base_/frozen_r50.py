# What a frozen ResNet-50 changes in a detector of MMDetection. For other weights than SER's:
# --cfg-options model.backbone.init_cfg.checkpoint=PATH
_base_ = ['mmdetection.py']

backbone = dict(
    type='mmpretrain.SERResNet',
    frozen_stages=4,  # all of it; -1 trains it with the detector
    init_cfg=dict(checkpoint='work_dirs/ser_mocov3_r50/epoch_100.pth', prefix='backbone.'),
)
# With any paramwise_cfg, MMEngine leaves frozen parameters out of the optimizer.
frozen_apart = dict(paramwise_cfg=dict(norm_decay_mult=1.0))
