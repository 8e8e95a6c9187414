# faster-rcnn_mocov3_vits16.py with the backbone pretrained by ser_mocov3_vits16.py.
_base_ = ['faster-rcnn_mocov3_vits16.py']

model = dict(
    backbone=dict(
        cls_layer=3,  # where that backbone inserts [CLS]; another place is refused
        init_cfg=dict(checkpoint='work_dirs/ser_mocov3_vits16/epoch_100.pth'),
    )
)
