# Fine-tuning of a ViT-S/16 as MoCo v3 has it: the recipe of DeiT, in 150 epochs (README of its
# authors). DeiT (main.py) repeats augmentations, clips no gradients, and reports the network, not
# its moving average; the rest is what MMPretrain has for the ViT-B of MoCo v3.
_base_ = [
    '_base_/classification.py',
    'mmpretrain::mocov3/benchmarks/vit-base-p16_8xb64-coslr-150e_in1k.py',
]

model = dict(
    backbone=dict(_delete_=True, **_base_.vits16, drop_path_rate=0.1),
    head=dict(in_channels=384),
)
train_dataloader = dict(**_base_.loader, sampler=dict(type='RepeatAugSampler'))
optim_wrapper = dict(clip_grad=None)
auto_scale_lr = dict(base_batch_size=512)
default_hooks = _base_.hooks
custom_hooks = _base_.watched
