# DINO, ViT-S/16, ImageNet-1k, 100 epochs, 8 x 256 images, two global views and no local crops:
# the baseline of ser_dino_vits16.py.
_base_ = [
    '_base_/imagenet_two_views.py',
    '_base_/schedule_100e.py',
    '_base_/default_runtime.py',
]

crop = dict(_base_.crop, crop_ratio_range=(0.25, 1.0), interpolation='bicubic')
view_pipeline1 = [crop, *_base_.photometry1, _base_.flip]
view_pipeline2 = [crop, *_base_.photometry2, _base_.flip]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[view_pipeline1, view_pipeline2])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

model = dict(
    type='DINO',
    base_momentum=0.018,
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='SERVisionTransformer',
        arch='deit-small',
        img_size=224,
        patch_size=16,
        drop_path_rate=0.1,
        linear_init='trunc_normal',
    ),
    neck=dict(
        type='DINONeck',
        in_channels=384,
        hid_channels=2048,
        bottleneck_channels=256,
        out_channels=65536,
        fixed_norm=False,
    ),
    head=dict(
        type='DINOHead',
        out_channels=65536,
        student_temperature=0.1,
        teacher_temperature=0.07,
        warmup_teacher_temperature=0.04,
        warmup_epochs=10,
        center_momentum=0.9,
    ),
)

# 1e-4 per 256 images; --auto-scale-lr adapts it to another global batch. Vectors, which biases
# and the parameters of norms are, do not decay.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=8e-4, weight_decay=0.04),
    paramwise_cfg=dict(flat_decay_mult=0.0),
    clip_grad=dict(max_norm=0.3),
)
auto_scale_lr = dict(base_batch_size=2048)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(eta_min_ratio=1 / 80)  # to 1e-5 from 8e-4
# From 0.04 to 0.4; what does not decay, at 0, stays there.
param_scheduler.append(
    dict(
        type='CosineAnnealingParamScheduler',
        param_name='weight_decay',
        T_max=_base_.max_epochs,
        eta_min_ratio=10,
        by_epoch=True,
        begin=0,
        end=_base_.max_epochs,
        convert_to_iter_based=True,
    )
)
custom_hooks = [*_base_.custom_hooks, dict(type='FreezeLayerHook', layer='neck.last_layer')]
