# mocov3_tiny_imagenet.py with a ViT of 96 x 6 and in few epochs: the baseline of
# ser_mocov3_tiny_imagenet_short.py.
_base_ = ['mocov3_tiny_imagenet.py']

model = dict(
    backbone=dict(arch=dict(embed_dims=96, num_layers=6, feedforward_channels=384)),
    neck=dict(in_channels=96),
)
max_epochs = 20
param_scheduler = [
    dict(_base_.param_scheduler[0], end=2),
    dict(_base_.param_scheduler[1], T_max=max_epochs - 2, begin=2, end=max_epochs),
]
train_cfg = dict(max_epochs=max_epochs)
