# The network of mocov3_tiny_imagenet_short.py trained on the labels in as many steps: the ceiling
# of what is compared there.
_base_ = ['mocov3_tiny_imagenet_short.py']

model = dict(
    _delete_=True,
    type='ImageClassifier',
    data_preprocessor=dict(type='ClsDataPreprocessor', **_base_.pixels),
    backbone=dict(_base_.model.backbone, stop_grad_conv1=False),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=200,
        in_channels=96,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

train_pipeline = [
    dict(_base_.crop, type='FastRandomResizedCrop'),
    dict(_base_.flip, type='FastRandomFlip'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
