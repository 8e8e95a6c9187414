# DINO + SER on Tiny ImageNet: what differs from dino_tiny_imagenet.py is all in this file.
_base_ = ['dino_tiny_imagenet.py']

algorithm = _base_.model
algorithm.backbone.update(ser_layer=3)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    data_preprocessor=dict(equi_ratio=1 / 32),
    neck=dict(type='SERNeck', hid_channels=256, out_channels=256),
    head=dict(type='SERHead', temperature=0.4),
    loss_weight=0.3,
)
