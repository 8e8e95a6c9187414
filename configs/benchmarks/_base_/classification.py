# What all configs of this folder share. For other weights than SER's:
# --cfg-options model.backbone.init_cfg.checkpoint=PATH, with model.backbone.cls_layer=0 for those
# of a ViT that has [CLS] from its input, as the baselines have.
_base_ = ['../../_base_/imagenet_evaluation.py']

custom_imports = dict(imports=['ser_mm'])

vits16 = dict(
    type='SERVisionTransformer',
    arch='deit-small',
    img_size=224,
    patch_size=16,
    cls_layer=3,  # where SER's backbone inserts [CLS]; weights that have it elsewhere are refused
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/ser_mocov3_vits16/epoch_100.pth'),
)
r50 = dict(
    type='SERResNet',
    depth=50,
    init_cfg=dict(type='Pretrained', checkpoint='work_dirs/ser_mocov3_r50/epoch_100.pth'),
)
# Weights from N(0, 0.01), a bias of 0.
linear = dict(type='LinearClsHead', num_classes=1000)

# With any paramwise_cfg, MMEngine leaves frozen parameters out of the optimizer.
frozen_apart = dict(paramwise_cfg=dict(norm_decay_mult=1.0))

hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(type='AtomicCheckpointHook', interval=1, max_keep_ckpts=1),
)
# Other crops in every epoch, and the same ones in a run that is resumed.
loader = dict(persistent_workers=False, worker_init_fn=dict(type='keep_worker_seed'))
watched = [dict(type='EpochSeedHook'), dict(type='NonFiniteLossHook', interval=50)]
