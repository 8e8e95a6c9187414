# mask-rcnn_mocov3_r50.py with the backbone pretrained by ser_mocov3_r50.py.
_base_ = ['mask-rcnn_mocov3_r50.py']

model = dict(backbone=dict(init_cfg=dict(checkpoint='work_dirs/ser_mocov3_r50/epoch_100.pth')))
