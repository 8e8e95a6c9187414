# MoCo v3, ViT-B/16: mocov3_vits16.py with the larger backbone.
_base_ = ['mocov3_vits16.py']

model = dict(backbone=dict(arch='deit-base'), neck=dict(in_channels=768))
