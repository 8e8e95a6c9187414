# What a frozen ViT-S/16 changes in a detector of MMDetection: the backbone, the pyramid made of its
# last map (ViTDet, arXiv 2203.16527), and the optimizer. For other weights than SER's:
# --cfg-options model.backbone.init_cfg.checkpoint=PATH, with model.backbone.cls_layer=0 for those
# of a network that has [CLS] from its input, as the baselines have.
_base_ = ['mmdetection.py']

backbone = dict(
    type='mmpretrain.SERVisionTransformer',
    arch='deit-small',
    img_size=224,
    patch_size=16,
    out_type='featmap',
    cls_layer=3,  # where SER's backbone inserts [CLS]; weights that have it elsewhere are refused
    frozen_stages=12,  # all of it; -1 trains it with the detector
    init_cfg=dict(
        type='Pretrained',
        checkpoint='work_dirs/ser_mocov3_vits16/epoch_100.pth',
        prefix='backbone.',
    ),
)
neck = dict(type='mmpretrain.SimpleFPN', in_channels=384, num_outs=5)

# As in ViTDet, norms have no weight decay. With any paramwise_cfg, MMEngine leaves frozen
# parameters out of the optimizer.
adamw = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
