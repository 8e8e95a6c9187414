"""The measures of networks: which maps they look at, and what the tables say."""

import copy
import json
import os
import shutil
from functools import wraps

import numpy as np
import pytest
import torch
from PIL import Image

from ser_mm.evaluation import build_loader, dense
from ser_mm.evaluation.dense import (
    MEASURES,
    _Run,
    check_waits_for_none,
    measure_dense,
    report_dense,
    select_maps,
)
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.segmentation import find_pairs
from tests.support.algorithms import RESNET
from tests.support.images import write_images
from tests.support.probed import config, write_checkpoint

SMALL = dict(images=4, step=60, affine=1)


def maps_of_three(images):
    return [torch.full((len(images), i, 2, 2), float(i)) for i in (1, 2, 3)]


def test_layers_are_counted_from_1():
    images = torch.zeros(2, 3, 8, 8)
    assert [f.shape[1] for f in select_maps(maps_of_three)(images)] == [1, 2, 3]
    assert [f.shape[1] for f in select_maps(maps_of_three, [3, 1])(images)] == [3, 1]
    with pytest.raises(ValueError, match=r'layers=\[1, 4\]: the network has 3, .* leave out 4'):
        select_maps(maps_of_three, [1, 4])(images)
    with pytest.raises(ValueError, match=r'a block gives \(2, 3\), not a token map'):
        select_maps(lambda x: [x.mean(dim=(2, 3))])(images)


def test_measures_are_known():
    with pytest.raises(ValueError, match=r"measures=\['depth'\]: choose one or more of corresp"):
        measure_dense(None, None, ['depth'])


def test_data_sets_that_several_processes_would_wait_in_are_refused(imagenet_tree):
    """MMPretrain's CIFAR10 has a barrier, which ranks with other measures did not come to."""
    cfg = config(imagenet_tree)
    cfg.default_scope = 'mmpretrain'
    check_waits_for_none(cfg, ['train', 'val'])
    cfg.evaluation.val = dict(type='mmpretrain.CIFAR10', data_root='data/cifar10', split='test')
    with pytest.raises(ValueError, match=r'evaluation.val.type=CIFAR10 .* as one process'):
        check_waits_for_none(cfg, ['train', 'val'])


@pytest.mark.parametrize('backbone', [None, dict(RESNET, depth=18)], ids=['vit', 'resnet'])
def test_correspondence_of_a_network(backbone, imagenet_tree):
    cfg = config(imagenet_tree)
    if backbone:
        cfg.model.algorithm.backbone = backbone
    found = measure_dense(cfg, None, ['correspondence'], [1, 3], **SMALL)
    assert found['layers'] == [1, 3]
    scores = found['correspondence']
    assert list(scores) == ['0', '60', '120', '180', '240', '300', 'affine']
    assert all(len(layers) == 2 for layers in scores.values())
    assert scores['0'][0]['matched'] == 1
    everything = measure_dense(cfg, None, ['correspondence'], **SMALL)['correspondence']
    for name, layers in scores.items():
        for layer, same in zip(layers, everything[name][:3:2], strict=True):
            assert layer == pytest.approx(same, nan_ok=True, abs=0)
    text = report_dense(json.loads(json.dumps(found)))
    assert '| wrong image, between ' in text and text.count('block 3') == 2
    assert set(MEASURES) >= set(found) - {'layers'}


@pytest.mark.parametrize('backbone', [None, dict(RESNET, depth=18)], ids=['vit', 'resnet'])
def test_probes_of_a_network(backbone, imagenet_tree):
    cfg = config(imagenet_tree)
    if backbone:
        cfg.model.algorithm.backbone = backbone
    found = measure_dense(cfg, None, ['angle', 'position'], train_images=12, **SMALL)
    assert list(found['angle']) == ['0', '60', '120', '180', '240', '300']
    # Of 4 images a class each, and at 0 degrees nothing is sampled anew.
    upright = found['angle']['0']
    assert upright['chance'] == 0.25 and upright['knn'] == upright['knn_back']
    assert len(found['position']['layers']) == 4
    assert found['position']['pixels']['r2'] < 1
    text = report_dense(json.loads(json.dumps(found)))
    assert '| mean, between ' in text and '| R2 of the row ' in text


LEAST = dict(images=2, train_images=8, step=180, affine=1)
ALL = set(MEASURES)


@pytest.fixture
def measured(monkeypatch):
    """Names of the measures that were taken anew."""
    names = set()

    def noted(name, function):
        @wraps(function)
        def measure(*args):
            names.add(name)
            return function(*args)

        return measure

    by_name = dict(
        correspondence='correspondence_by_layer',
        angle='accuracy_by_angle',
        position='position_by_layer',
        segmentation='segmentation_by_layer',
    )
    for name, function in by_name.items():
        monkeypatch.setattr(dense, function, noted(name, getattr(dense, function)))
    return names


@pytest.fixture
def shapes(tmp_path):
    """Two images with masks of two classes, to train on and to validate on."""
    for split in ('train', 'val'):
        for i in (0, 1):
            (image,) = write_images(tmp_path / f'shapes/{split}/images', f'{i}.png', side=32)
            mask = np.zeros((32, 32), np.uint8)
            mask[:, 16 * i : 16 * i + 16] = 1
            (image.parents[1] / 'masks').mkdir(exist_ok=True)
            Image.fromarray(mask).save(image.parents[1] / 'masks' / image.name)
    return tmp_path / 'shapes'


def test_a_measure_is_kept_until_something_changes(
    imagenet_tree, shapes, checkpoint, tmp_path, measured, capsys
):
    def again(**options):
        measured.clear()
        options = LEAST | dict(masks=shapes, keep=tmp_path / 'a.b') | options
        return measure_dense(config(imagenet_tree), checkpoint, **options), set(measured)

    first, done = again()
    assert done == ALL and list(first) == ['layers', *MEASURES]
    assert sorted(path.name for path in tmp_path.glob('*.kept')) == [
        f'a.b.{name}.kept' for name in sorted(MEASURES)
    ]
    found, done = again(affine=2, batch_size=3)
    assert done == {'correspondence'} and 'angle: taken from ' in capsys.readouterr().out
    assert found.pop('correspondence') != first.pop('correspondence')
    assert found == first


def test_what_a_measure_depends_on(imagenet_tree, shapes, checkpoint, tmp_path):
    tree = tmp_path / 'tree'
    shutil.copytree(imagenet_tree, tree)
    cfg = config(tree)
    splits = ('train', 'val')
    datasets = {split: build_loader(cfg, split)[1].dataset for split in splits}
    pairs = {split: find_pairs(shapes, split) for split in splits}

    def run_of(cfg=cfg, checkpoint=checkpoint):
        run = _Run(CachedFeatures(cfg, checkpoint, ''), pairs, [1, 2], 2, 8, 180, 1, 1.0, 0)
        run.numbers = [1, 2]
        return run

    run = run_of()
    keys = {}

    def changed(run=run):
        """Measures that depend on what has changed since the last call."""
        before = dict(keys)
        keys.update({name: run.key(name, datasets) for name in MEASURES})
        return {name for name in MEASURES if keys[name] != before.get(name)}

    assert changed() == ALL and changed() == changed(run_of()) == set()
    assert len(set(keys.values())) == len(MEASURES)
    for change, expected in {
        ('step', 120): {'correspondence', 'angle'},
        ('affine', 2): {'correspondence'},
        ('within', 2): {'correspondence'},
        ('seed', 1): {'correspondence'},  # the network has its weights
        ('numbers', (1, 3)): ALL - {'angle'},
        ('images', (('train', 8), ('val', 4))): {'correspondence', 'angle', 'position'},
        ('images', (('train', 16), ('val', 4))): {'angle', 'position'},
        ('images', (('train', 8), ('val', 2))): {'correspondence', 'angle', 'position'},
    }.items():
        name, value = change
        setattr(run, name, dict(value) if name == 'images' else value)
        assert (change, changed()) == (change, expected)
    # Of 16 images, 0 and 8 are looked at, and 0, 2, 4, ... to train on.
    files = sorted(tree.glob('train/*/*'))
    for place, expected in {1: set(), 2: {'angle', 'position'}, 8: ALL - {'segmentation'}}.items():
        os.utime(files[place], (0, 0))
        assert (place, changed()) == (place, expected)
    os.utime(shapes / 'val/masks/1.png', (0, 0))
    assert changed() == {'segmentation'}

    changed(run_of())
    assert changed(run_of(checkpoint=write_checkpoint(tmp_path / 'other.pth', 1))) == ALL
    assert changed(run_of()) == ALL
    other = copy.deepcopy(cfg)
    other.evaluation.train.pipeline[1].crop_size = 24
    assert changed(run_of(other)) == {'angle', 'position'}
    assert changed(run_of()) == {'angle', 'position'}
    other = copy.deepcopy(cfg)
    other.evaluation.val.pipeline[1].crop_size = 24
    assert changed(run_of(other)) == ALL


def test_a_damaged_file_is_told_and_made_again(imagenet_tree, tmp_path, measured, capsys):
    options = LEAST | dict(keep=tmp_path / 'a')
    first = measure_dense(config(imagenet_tree), None, ['correspondence'], **options)
    file = tmp_path / 'a.correspondence.kept'
    file.write_bytes(file.read_bytes()[:-9])
    measured.clear()
    assert measure_dense(config(imagenet_tree), None, ['correspondence'], **options) == first
    assert measured and f'{file} cannot be read' in capsys.readouterr().out


def test_measures_do_not_depend_on_each_other(imagenet_tree, tmp_path, measured):
    """And follow the seed of an untrained network, also where they are kept."""
    cfg, options = config(imagenet_tree), LEAST | dict(keep=tmp_path / 'a')
    both = measure_dense(cfg, None, ['correspondence', 'position'], **options)
    assert measure_dense(cfg, None, ['position'], **LEAST)['position'] == both['position']
    measured.clear()
    other = measure_dense(cfg, None, ['position'], seed=1, **options)
    assert measured == {'position'} and other['position'] != both['position']
