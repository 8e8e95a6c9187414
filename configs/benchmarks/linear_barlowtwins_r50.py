# Linear evaluation of a ResNet-50 as Barlow Twins has it: SGD, a learning rate of 0.3, weight decay
# 1e-6, 100 epochs, 256 images (evaluate.py of its authors).
_base_ = [
    '_base_/classification.py',
    'mmpretrain::barlowtwins/benchmarks/resnet50_8xb32-linear-coslr-100e_in1k.py',
]

weights = dict(type='Pretrained', checkpoint='work_dirs/ser_barlowtwins_r50/epoch_100.pth')
model = dict(
    _delete_=True,
    type='FrozenClassifier',
    backbone=dict(_base_.r50, init_cfg=weights),
    head=dict(**_base_.linear, in_channels=2048),
)
train_dataloader = _base_.loader
optim_wrapper = _base_.frozen_apart
auto_scale_lr = dict(base_batch_size=256)
default_hooks = _base_.hooks
custom_hooks = _base_.watched
