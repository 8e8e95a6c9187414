# Linear evaluation of a ViT-S/16 as DINO has it: the [CLS] tokens of the last four blocks, SGD, a
# learning rate of 0.001 per 256 images, no weight decay, 100 epochs, 8 x 128 images
# (eval_linear.py of its authors, who recommend to adapt the rate to the weights). Of a run of DINO
# the teacher is evaluated; for weights of others, model.backbone.init_cfg.prefix=None.
_base_ = ['linear_mocov3_vits16.py']

teacher = 'teacher.module.0.'
weights = dict(checkpoint='work_dirs/ser_dino_vits16/epoch_100.pth', prefix=teacher)
model = dict(
    backbone=dict(init_cfg=weights),
    head=dict(in_channels=4 * 384),
    blocks=4,
)
optim_wrapper = dict(optimizer=dict(lr=0.004))
train_cfg = dict(max_epochs=100)
param_scheduler = [dict(_base_.param_scheduler[0], T_max=100, end=100)]

test_pipeline = _base_.test_pipeline
test_pipeline[1].update(interpolation='bicubic')
val_dataloader = test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
evaluation = dict(prefix=teacher)
