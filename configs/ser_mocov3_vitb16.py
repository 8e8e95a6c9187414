# MoCo v3 + SER, ViT-B/16: ser_mocov3_vits16.py with the larger backbone.
_base_ = ['ser_mocov3_vits16.py']

model = dict(algorithm=dict(backbone=dict(arch='deit-base'), neck=dict(in_channels=768)))
