# MoCo v3 + SER on CIFAR-10: what differs from mocov3_cifar10.py is all in this file.
_base_ = ['mocov3_cifar10.py']

algorithm = _base_.model
algorithm.backbone.update(ser_layer=3)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    data_preprocessor=dict(equi_ratio=1 / 32),
    neck=dict(type='SERNeck', hid_channels=256, out_channels=256),
    head=dict(type='SERHead', temperature=0.5),
    loss_weight=1.0,
)
