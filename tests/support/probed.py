"""A network to probe, and labelled images."""

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

from ser_mm.engine.configs import find_config
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


def write_untrained(name, path):
    """A checkpoint of a shipped config at its start, in the scope of the config."""
    cfg = Config.fromfile(find_config(name))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)
