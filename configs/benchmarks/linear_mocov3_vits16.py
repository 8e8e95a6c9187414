# Linear evaluation of a ViT-S/16 as MoCo v3 has it: SGD, a learning rate of 3 per 256 images, no
# weight decay, 90 epochs, 8 x 128 images (main_lincls.py and CONFIG.md of its authors).
_base_ = [
    '_base_/classification.py',
    'mmpretrain::mocov3/benchmarks/vit-small-p16_8xb128-linear-coslr-90e_in1k.py',
]

model = dict(
    _delete_=True,
    type='FrozenClassifier',
    backbone=_base_.vits16,
    head=dict(**_base_.linear, in_channels=384),
)
train_dataloader = _base_.loader
optim_wrapper = _base_.frozen_apart
auto_scale_lr = dict(base_batch_size=1024)
default_hooks = _base_.hooks
custom_hooks = _base_.watched
