"""Figures of a network in training, in runs of a few steps."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from ser_mm.evaluation import knn_probe, linear_probe
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.metrics import rank_me
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS
from tests.support.two_ranks import on_two_ranks

VIEWS = short_run.equivariant_views(equi_ratio=0.5)


def config(root):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='CenterCrop', crop_size=64),
        dict(type='PackInputs'),
    ]
    dataset = dict(type='CustomDataset', data_root=str(root), pipeline=pipeline)
    sets = {split: dict(dataset, data_prefix='train') for split in ('train', 'val')}
    return Config(dict(model=ALGORITHMS['mocov3'], evaluation=sets))


class Draw(Hook):
    """What is drawn after the other hooks of an epoch, before the next one is seeded."""

    priority = 'LOWEST'

    def __init__(self):
        self.numbers = []

    def after_train_epoch(self, runner):
        self.numbers.append(torch.rand(()).item())


def run(root, folder, epochs=2, **options):
    """States and numbers drawn."""
    cfg, draw = config(root), Draw()
    hooks = [dict(type='ProbeHook', **options)] if options else []
    hooks = [*hooks, draw]
    _, states = short_run.run(cfg.model, VIEWS, root, folder, epochs, hooks=hooks, cfg=cfg)
    return states, draw.numbers


def logged(folder):
    (file,) = folder.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record for record in records if 'probe/rankme' in record]


def test_figures_are_those_of_the_checkpoints_and_the_run_is_as_without(imagenet_tree, tmp_path):
    plain, drawn = run(imagenet_tree, tmp_path / 'plain')
    images = dict(train_images=12, val_images=6, batch_size=5)
    watched, also_drawn = run(imagenet_tree, tmp_path / 'watched', **images)
    assert drawn == also_drawn
    for state, other in zip(plain, watched, strict=True):
        assert [k for k in state if not torch.equal(state[k], other[k])] == []
    found = logged(tmp_path / 'watched')
    assert [record['step'] for record in found] == [4, 8]
    cfg = config(imagenet_tree)
    for split, count in dict(train=12, val=6).items():
        cfg.evaluation[split].indices = [i * 16 // count for i in range(count)]
    for epoch, record in enumerate(found, 1):
        checkpoint = str(tmp_path / f'watched/epoch_{epoch}.pth')
        source = CachedFeatures(cfg, checkpoint, tmp_path / 'cache')
        train, val = source.load('train'), source.load('val')
        assert record['probe/knn'] == knn_probe(*train, *val)
        assert record['probe/linear'] == linear_probe(*train, *val)
        assert record['probe/rankme'] == pytest.approx(rank_me(val[0]), rel=1e-4)


def test_some_measures_at_some_epochs(imagenet_tree, tmp_path):
    run(imagenet_tree, tmp_path, interval=2, measures=['rankme'], val_images=6)
    (record,) = logged(tmp_path)
    assert record['step'] == 8 and 'probe/knn' not in record


def test_data_that_is_missing_stops_the_run_before_it_begins(imagenet_tree, tmp_path):
    cfg = config(imagenet_tree)
    cfg.evaluation.val.data_prefix = 'nowhere'
    hooks = [dict(type='ProbeHook')]
    with pytest.raises(FileNotFoundError, match=r'evaluation\.val'):
        short_run.run(cfg.model, VIEWS, imagenet_tree, tmp_path, hooks=hooks, cfg=cfg)
    assert not list(tmp_path.glob('*.pth'))


def _watch(rank, root, folder):
    return run(root, f'{folder}/run', 1, train_images=12, val_images=5)[0]


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(imagenet_tree, tmp_path):
    on_two_ranks(_watch, str(imagenet_tree), str(tmp_path))
    (record,) = logged(tmp_path / 'run')
    cfg = config(imagenet_tree)
    for split, count in dict(train=12, val=5).items():
        cfg.evaluation[split].indices = [i * 16 // count for i in range(count)]
    source = CachedFeatures(cfg, str(tmp_path / 'run/epoch_1.pth'), tmp_path / 'cache')
    train, val = source.load('train'), source.load('val')
    assert record['probe/knn'] == knn_probe(*train, *val)
    assert record['probe/linear'] == linear_probe(*train, *val)
