# Linear evaluation of a ResNet-50 as MoCo v3 has it: as linear_mocov3_vits16.py, but for a learning
# rate of 0.1 per 256 images.
_base_ = [
    '_base_/classification.py',
    'mmpretrain::mocov3/benchmarks/resnet50_8xb128-linear-coslr-90e_in1k.py',
]

model = dict(
    _delete_=True,
    type='FrozenClassifier',
    backbone=_base_.r50,
    head=dict(**_base_.linear, in_channels=2048),
)
train_dataloader = _base_.loader
optim_wrapper = _base_.frozen_apart
auto_scale_lr = dict(base_batch_size=1024)
default_hooks = _base_.hooks
custom_hooks = _base_.watched
