# Barlow Twins + SER: what differs from barlowtwins_vits16.py is all in this file.
_base_ = ['barlowtwins_vits16.py']

algorithm = _base_.model
algorithm.pop('data_preprocessor')
algorithm.backbone.update(ser_layer=3)
model = dict(
    _delete_=True,
    type='SERAlgorithm',
    algorithm=algorithm,
    neck=dict(type='SERNeck', in_channels=384),
    head=dict(type='SERHead', temperature=0.4),
    loss_weight=1.0,  # README, Results: little beside the loss of Barlow Twins
    data_preprocessor=dict(_base_.data_preprocessor, type='SERDataPreprocessor'),
)

train_pipeline = _base_.train_pipeline
train_pipeline[1] = dict(
    type='EquivariantViewPipeline',
    equi_ratio=0.01,
    views=[_base_.view_pipeline1, _base_.view_pipeline2],
    equi_crop=[_base_.crop],
    equi_views=[_base_.photometry1, _base_.photometry2],
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
