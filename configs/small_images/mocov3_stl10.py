# MoCo v3 on the unlabelled images of STL-10, 96 x 96 pixels, a ViT of 192 x 9 on 64 tokens of
# 12 x 12: the baseline of ser_mocov3_stl10.py.
# data/stl10_binary/{unlabeled,train,test}_X.bin, {train,test}_y.bin
_base_ = ['../tiny_imagenet/mocov3_tiny_imagenet.py']

crop = dict(_base_.crop, scale=96)
blur = dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf')
color = [*_base_.color, dict(**blur, prob=0.5)]
views = [[crop, *color, _base_.flip], [crop, *color, _base_.solarize, _base_.flip]]
data_preprocessor = dict(to_rgb=False, views=views)
model = dict(data_preprocessor=data_preprocessor, backbone=dict(img_size=96, patch_size=12))

pack = [dict(type='PackInputs')]
dataset = dict(type='STL10', data_root='data/stl10_binary', pipeline=pack)
evaluation = dict(
    train=dict(_delete_=True, **dataset, split='train'),
    val=dict(_delete_=True, **dataset, split='test'),
)
train_dataloader = dict(dataset=dict(_delete_=True, **dataset, split='unlabeled'))
test_dataloader = dict(dataset=evaluation['val'])
