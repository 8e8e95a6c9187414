"""The shipped COCO configs on a small data set."""

import copy
import re
from functools import cache

import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.runner import Runner

from tests.support.paths import ROOT

NAMES = sorted(config.stem for config in (ROOT / 'configs' / 'coco').glob('*.py'))
DIGITS = tuple('0123456789')
TINY = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)


@cache
def _load(name):
    return Config.fromfile(ROOT / 'configs' / 'coco' / f'{name}.py')


def load(name, **options):
    cfg = copy.deepcopy(_load(name))
    cfg.merge_from_dict(options)
    return cfg


def on_digits(root):
    """What a user changes to train on other data."""
    options = {}
    for split in ('train', 'val', 'test'):
        name = 'train' if split == 'train' else 'val'
        dataset = f'{split}_dataloader.dataset.'
        options |= {
            f'{dataset}data_root': f'{root}/',
            f'{dataset}ann_file': f'{name}.json',
            f'{dataset}data_prefix.img': f'{name}/',
            f'{dataset}metainfo.classes': DIGITS,
            f'{dataset}pipeline.{3 if split == "train" else 2}.scale': (96, 96),
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
        }
        if split != 'train':
            options[f'{split}_evaluator.ann_file'] = f'{root}/val.json'
    return options


def with_classes(cfg, count):
    heads = cfg.model.get('roi_head', cfg.model)
    for head in ('bbox_head', 'mask_head'):
        if head in heads:
            heads[head].num_classes = count
    return cfg


def make_small(cfg, checkpoint):
    """A tiny ViT in place of ViT-S, one epoch, and a checkpoint of random weights to start from."""
    backbone = cfg.model.backbone
    if 'arch' in backbone:
        backbone.update(arch=TINY, frozen_stages=4)
        cfg.model.neck.in_channels = 48
    torch.manual_seed(1)
    network = DETECTORS.build(dict(backbone, init_cfg=None))
    network.init_weights()
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    weights = {f'backbone.{key}': value for key, value in network.state_dict().items()}
    torch.save(dict(state_dict=weights), checkpoint)
    backbone.init_cfg.checkpoint = str(checkpoint)
    cfg.train_cfg.max_epochs = 1
    # Untrained, RetinaNet is sure of nothing, and then MMDetection reports nothing.
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).score_thr = 0.0
    return with_classes(cfg, 10)


def make_runner(cfg, work_dir):
    """MMEngine's own Runner, as MMDetection's tools make it."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = re.sub(r'\W', '_', str(work_dir))
    cfg.default_hooks.logger.interval = 1
    return Runner.from_cfg(cfg)


def backbone_weights(checkpoint):
    weights = torch.load(checkpoint)['state_dict']
    return {key.removeprefix('backbone.'): value for key, value in weights.items()}


def assert_same_weights(network, weights):
    state = network.state_dict()
    assert state.keys() == weights.keys()
    for key, value in state.items():
        assert torch.equal(value, weights[key]), key
