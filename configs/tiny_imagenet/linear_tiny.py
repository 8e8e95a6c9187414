# linear_mocov3_vits16.py for the networks of mocov3_tiny_imagenet_short.py: Tiny ImageNet, 64 x 64
# pixels, a ViT of 96 x 6. Weights and cls_layer are options, as there.
_base_ = ['../benchmarks/linear_mocov3_vits16.py']

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=384
        ),
        img_size=64,
        patch_size=8,
        cls_layer=2,
        init_cfg=dict(checkpoint='work_dirs/ser_mocov3_tiny_imagenet_short/epoch_2.pth'),
    ),
    head=dict(num_classes=200, in_channels=96),
)

load, pack = _base_.train_pipeline[0], _base_.train_pipeline[-1]
crop = dict(_base_.train_pipeline[1], scale=64)
train_pipeline = [load, crop, _base_.train_pipeline[2], pack]
test_pipeline = [load, pack]
train_set = dict(_delete_=True, type='TinyImageNet', split='train', pipeline=train_pipeline)
val_set = dict(_delete_=True, type='TinyImageNet', split='val', pipeline=test_pipeline)
train_dataloader = dict(batch_size=1024, dataset=train_set)
val_dataloader = test_dataloader = dict(batch_size=250, dataset=val_set)
evaluation = dict(train=dict(val_set, split='train'), val=val_set)
