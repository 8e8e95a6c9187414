# DINO at toy scale, on the data and schedule of mocov3.py: the baseline of ser_dino.py. In so few
# steps it learns only if its targets stay sharp and its prototypes stable.
_base_ = ['mocov3.py']

model = dict(
    _delete_=True,
    type='DINO',
    base_momentum=0.02,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False, drop_path_rate=0.1),
    neck=dict(
        type='DINONeck',
        in_channels=96,
        hid_channels=256,
        bottleneck_channels=64,
        out_channels=1024,
        fixed_norm=True,
    ),
    head=dict(type='DINOHead', out_channels=1024, teacher_temperature=0.04),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=0.3),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
custom_hooks = [*_base_.custom_hooks, dict(type='FreezeLayerHook', layer='neck.last_layer')]
