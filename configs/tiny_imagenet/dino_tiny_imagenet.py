# DINO on Tiny ImageNet, two views: the baseline of ser_dino_tiny_imagenet.py.
_base_ = ['mocov3_tiny_imagenet.py']

model = dict(
    _delete_=True,
    type='DINO',
    base_momentum=0.01,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False, drop_path_rate=0.1),
    neck=dict(
        type='DINONeck',
        in_channels=192,
        hid_channels=1024,
        bottleneck_channels=256,
        out_channels=4096,
        fixed_norm=True,
    ),
    head=dict(type='DINOHead', out_channels=4096, teacher_temperature=0.04),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, weight_decay=0.04),
    clip_grad=dict(max_norm=0.3),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
custom_hooks = [*_base_.custom_hooks, dict(type='FreezeLayerHook', layer='neck.last_layer')]
