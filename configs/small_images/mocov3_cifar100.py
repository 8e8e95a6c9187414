# MoCo v3 on CIFAR-100: the baseline of ser_mocov3_cifar100.py. MMPretrain downloads the data set to
# data/cifar100 when it is not there.
_base_ = ['mocov3_cifar10.py']

other = dict(type='CIFAR100', data_root='data/cifar100')
evaluation = dict(train=other, val=other)
train_dataloader = dict(dataset=other)
test_dataloader = dict(dataset=other)

pixels = dict(mean=[129.304, 124.070, 112.434], std=[68.170, 65.392, 70.418])
data_preprocessor = pixels
model = dict(data_preprocessor=pixels)
