"""Data sets of pixels in files of theirs, in the layouts of CIFAR and STL-10, with noise."""

import pickle

import numpy as np
from mmpretrain.datasets import CIFAR10
from mmpretrain.registry import DATASETS


@DATASETS.register_module(force=True)
class OwnCIFAR(CIFAR10):
    """MMPretrain's, with files of ours: pixels in the list, nothing to load."""

    train_list, test_list = [['batch', None]], [['batch', None]]
    meta = dict(filename='meta', key='label_names', md5=None)


def write_cifar(root, images=10, seed=0):
    """Write one batch of images of classes 0, 1, 0, 1, ..., which is both splits."""
    pixels = np.random.default_rng(seed).integers(256, size=(images, 3072)).astype(np.uint8)
    (root / OwnCIFAR.base_folder).mkdir(parents=True, exist_ok=True)
    labels = [n % 2 for n in range(images)]
    file = root / OwnCIFAR.base_folder / 'batch'
    file.write_bytes(pickle.dumps(dict(data=pixels, labels=labels)))
    return root


def write_stl10(root, images=4):
    """Write as many images of each split, of classes 1, 2, 1, 2, ..."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    labels = np.array([1 + n % 2 for n in range(images)], np.uint8)
    for split in ('unlabeled', 'train', 'test'):
        rng.integers(256, size=(images, 3, 96, 96)).astype(np.uint8).tofile(root / f'{split}_X.bin')
        if split != 'unlabeled':
            labels.tofile(root / f'{split}_y.bin')
    return root
