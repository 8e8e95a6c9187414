"""A network to probe, and labelled images."""

import torch
from mmengine.config import Config

from tests.support.algorithms import ALGORITHMS, build

PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs'),
]


def config(root, **dataset):
    """Config of a tiny network, evaluated on the training images of an ImageNet tree."""
    dataset = dict(type='CustomDataset', data_root=str(root), pipeline=PIPELINE, **dataset)
    return Config(
        dict(
            model=ALGORITHMS['mocov3'],
            evaluation={split: dict(dataset, data_prefix='train') for split in ('train', 'val')},
        )
    )


def write_checkpoint(path, seed=0):
    """A checkpoint of random weights that fits :func:`config`."""
    torch.manual_seed(seed)
    model = build(ALGORITHMS['mocov3'])
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)
