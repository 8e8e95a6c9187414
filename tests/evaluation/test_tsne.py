"""t-SNE of chosen classes: a figure, and numbers that say what it shows."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_probe import config, tool

from tests.support.algorithms import ALGORITHMS, build


def test_numbers_of_known_maps():
    measure = runpy.run_path(str(Path(__file__).parents[1] / 'tools' / 'tsne.py'))['measure']
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    noise = rng.normal(size=(1000, 2))
    apart = measure(noise + 1000 * labels[:, None], labels)
    assert apart['agreement'] == 1 and apart['silhouette'] > 0.99
    mixed = measure(noise, labels)
    assert mixed['agreement'] == pytest.approx(0.5, abs=0.05)
    assert mixed['silhouette'] == pytest.approx(0, abs=0.01)


def test_two_checkpoints_side_by_side(imagenet_tree, tmp_path):
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(build(ALGORITHMS['mocov3']).state_dict(), tmp_path / f'{seed}.pth')
        runs += [tmp_path / 'config.py', tmp_path / f'{seed}.pth']
    cfg = config(imagenet_tree, indices=[15, *range(15)])  # the subset is one of this subset
    cfg.default_scope = 'mmpretrain'
    cfg.dump(tmp_path / 'config.py')
    places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
    names = ('--names', 'a', 'b', '--perplexity', 3, '--corruption', 'contrast', '--severity', 5)
    chosen = ('--classes', 'n00000003', 'n00000000', 'n00000001')
    assert tool('tsne', *runs, *names, *chosen, *places) is None
    results = json.loads((tmp_path / 'out' / 'tsne.json').read_text())
    assert results['classes'] == sorted(chosen[1:])
    assert list(results['results']) == ['a', 'b']
    clean = results['results']['a']['clean']
    assert clean != results['results']['a']['contrast/5'] != results['results']['b']['contrast/5']
    assert set(clean['map']) == set(clean['features']) == {'silhouette', 'agreement'}
    assert Image.open(tmp_path / 'out' / 'tsne.png').size[0] > 1000
    for file in (tmp_path / 'cache').iterdir():
        with np.load(file) as arrays:
            assert sorted(set(arrays['labels'].tolist())) == [0, 1, 3]

    code = tool('tsne', *runs, *names, '--classes', 'n00000000', 'dog', *places)
    assert code == (
        'error: --classes dog: choose two or more of n00000000, n00000001, n00000002, n00000003.'
    )
    code = tool('tsne', *runs, *names[:3], *chosen, *places)
    assert code.startswith('error: --perplexity 30 needs more than 12 images')
