# Barlow Twins, ResNet-50, ImageNet-1k, 100 epochs, 8 x 256 images: the baseline of
# ser_barlowtwins_r50.py. MMPretrain's recipe (barlowtwins_resnet50_8xb256-coslr-300e_in1k).
_base_ = ['barlowtwins_vits16.py']

model = dict(
    backbone=dict(_delete_=True, type='SERResNet', depth=50),
    neck=dict(
        in_channels=2048,
        with_avg_pool=True,
        init_cfg=dict(type='Kaiming', distribution='uniform', layer=['Linear']),
    ),
)

# 0.2 per 256 images; --auto-scale-lr adapts it to another global batch.
excluded = dict(decay_mult=0, lr_mult=0.024, lars_exclude=True)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='LARS', lr=1.6, momentum=0.9, weight_decay=1e-6),
    paramwise_cfg=dict(
        custom_keys={'bn': excluded, 'bias': excluded, 'downsample.1': excluded},
    ),
)
