# Barlow Twins + SER at toy scale: what differs from barlowtwins.py is all in this file.
_base_ = ['barlowtwins.py']

algorithm = _base_.model
algorithm.pop('data_preprocessor')
algorithm.backbone.update(ser_layer=2)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    neck=dict(type='SERNeck', in_channels=96, hid_channels=128, out_channels=128),
    head=dict(type='SERHead', temperature=0.4),
    loss_weight=50.0,  # at 1, its gradient would be small: benchmarks/gradients.py
    data_preprocessor=dict(_base_.data_preprocessor, type='SERDataPreprocessor', patch_size=8),
)

train_pipeline = _base_.train_pipeline
train_pipeline[1] = dict(
    type='EquivariantViewPipeline',
    equi_ratio=1 / 8,
    views=[_base_.view_pipeline1, _base_.view_pipeline2],
    equi_crop=[_base_.crop],
    equi_views=[_base_.photometry1, _base_.photometry2],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
