# Fine-tuning of a ResNet-50 on 1 % of the labels as Barlow Twins has it: SGD, a learning rate of
# 0.005 and for the classifier of 0.5, no weight decay, 20 epochs, 256 images (README and
# evaluate.py of its authors). ann_file has a line "<wordnet id>/<file> LABEL" for each image.
_base_ = [
    '_base_/classification.py',
    'mmpretrain::barlowtwins/benchmarks/resnet50_8xb32-linear-coslr-100e_in1k.py',
]

weights = dict(type='Pretrained', checkpoint='work_dirs/ser_barlowtwins_r50/epoch_100.pth')
model = dict(backbone=dict(_delete_=True, **dict(_base_.r50, init_cfg=weights)))
train_dataloader = dict(**_base_.loader, dataset=dict(ann_file='meta/train_1percent.txt'))
optim_wrapper = dict(
    optimizer=dict(lr=0.005, weight_decay=0.0),
    paramwise_cfg=dict(custom_keys={'head': dict(lr_mult=100)}),
)
train_cfg = dict(max_epochs=20)
param_scheduler = [dict(_base_.param_scheduler[0], T_max=20, end=20)]
auto_scale_lr = dict(base_batch_size=256)
default_hooks = _base_.hooks
custom_hooks = _base_.watched
