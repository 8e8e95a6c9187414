# DINO at toy scale, on the data and schedule of mocov3.py: the baseline of ser_dino.py.
_base_ = ['mocov3.py']

model = dict(
    _delete_=True,
    type='DINO',
    base_momentum=0.05,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False, drop_path_rate=0.1),
    neck=dict(
        type='DINONeck',
        in_channels=96,
        hid_channels=256,
        bottleneck_channels=64,
        out_channels=1024,
        fixed_norm=False,
    ),
    head=dict(type='DINOHead', out_channels=1024, warmup_epochs=2),
)
optim_wrapper = dict(clip_grad=dict(max_norm=0.3), paramwise_cfg=dict(flat_decay_mult=0.0))
custom_hooks = [*_base_.custom_hooks, dict(type='FreezeLayerHook', layer='neck.last_layer')]
