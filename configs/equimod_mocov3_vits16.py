# MoCo v3 + EquiMod on the final [CLS] token, as its authors have it, on the policy of
# mocov3_vits16.py. It sees a third view, the image without augmentation; its control has
# model.loss_weight=0. loss='moco' in the head is the loss of SER's release.
_base_ = ['mocov3_vits16.py']

model = dict(
    _delete_=True,
    type='EquivarianceAlgorithm',
    algorithm=_base_.model,
    head=dict(type='EquiModHead', hid_channels=2048, temperature=0.2),
    loss_weight=1.0,
)

image = [dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)]
train_pipeline = _base_.train_pipeline
train_pipeline[1].update(
    type='EquivariantViewPipeline', equi_ratio=0, record_draws=True, extra_views=[image]
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
