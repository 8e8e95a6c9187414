# ser_mocov3_vits16.py with the same photometry on the device: workers decode, crop and flip.
_base_ = ['ser_mocov3_vits16.py']

model = dict(data_preprocessor=dict(photometry=[_base_.photometry1, _base_.photometry2]))

geometry = [_base_.crop, _base_.flip]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(transforms=[geometry, geometry])
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
