# mocov3_tiny_imagenet.py for 2 CPU cores, 40 minutes on one of them: a ViT of 96 x 6, and small
# batches, so that 2 epochs have 1562 steps. The baseline of ser_mocov3_tiny_imagenet_short.py.
_base_ = ['mocov3_tiny_imagenet.py']

model = dict(
    backbone=dict(arch=dict(embed_dims=96, num_layers=6, feedforward_channels=384)),
    neck=dict(in_channels=96),
)
train_dataloader = dict(batch_size=128)
# Chosen by the baseline's k-NN among 1.5e-3 and 3e-3, see docs/results/tiny_imagenet.md.
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
max_epochs = 2
param_scheduler = [
    # In steps, so that it stays where the run is made shorter.
    dict(type='LinearLR', start_factor=1e-2, by_epoch=False, begin=0, end=150),
    dict(_base_.param_scheduler[1], T_max=max_epochs, begin=0, end=max_epochs),
]
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=100))
