# MoCo v3 + AugSelf, its objective moved to the [CLS] token after block 3, which is inserted at the
# input. Without cls_layer=0, [CLS] comes after block 3 and the mean of the patch tokens is taken.
_base_ = ['augself_mocov3_vits16.py']

model = dict(algorithm=dict(backbone=dict(ser_layer=3, cls_layer=0)))
