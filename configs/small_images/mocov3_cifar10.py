# MoCo v3 on CIFAR-10, a ViT of 192 x 9 on 64 tokens of 4 x 4 pixels: the baseline of
# ser_mocov3_cifar10.py. MMPretrain downloads the data set to data/cifar10 when it is not there.
_base_ = ['../tiny_imagenet/mocov3_tiny_imagenet.py']

pixels = dict(
    mean=[125.307, 122.961, 113.8575],
    std=[51.5865, 50.847, 51.255],
    to_rgb=False,  # as they are, other than those of files
)
crop = dict(_base_.crop, scale=32)
views = [[crop, *_base_.color, _base_.flip], [crop, *_base_.color, _base_.solarize, _base_.flip]]
data_preprocessor = dict(**pixels, views=views)
model = dict(data_preprocessor=data_preprocessor, backbone=dict(img_size=32, patch_size=4))

pack = [dict(type='PackInputs')]
dataset = dict(type='CIFAR10', data_root='data/cifar10', split='train', pipeline=pack)
evaluation = dict(
    train=dict(_delete_=True, **dataset),
    val=dict(_delete_=True, **dataset) | dict(split='test'),
)
train_dataloader = dict(dataset=dict(_delete_=True, **dataset))
test_dataloader = dict(dataset=evaluation['val'])
