"""Sets in the folders of ImageNet-V2, -R, -A and -Sketch as published, with known scores."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn

from tests.support.command import run_command

WNIDS = sorted(f'n{7919 * (i + 3) % 10**8:08d}' for i in range(12))


@MODELS.register_module(force=True)
class Cells(nn.Module):
    """How bright each of 4 x 4 cells of an image is: a class is a cell."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.scale * F.adaptive_avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1),)

    def init_weights(self):
        pass


def write(path, **cells):
    """A JPEG whose cells have these levels of grey, black but for them."""
    pixels = np.zeros((4, 4), np.uint8)
    for cell, level in cells.items():
        pixels.flat[int(cell[1:])] = level
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).convert('RGB').save(path, quality=95)


@pytest.fixture
def run(tmp_path):
    """A command line in the folder of data sets of 12 classes."""
    data = tmp_path / 'data'
    for i, name in enumerate(WNIDS):
        for j in range(5):
            write(data / 'imagenet' / 'train' / name / f'{name}_{j}.JPEG', **{f'c{i}': 240 - j})
        write(data / 'imagenet' / 'val' / name / 'ILSVRC2012_val_1.JPEG', **{f'c{i}': 240})
        write(data / 'v2' / str(i) / 'd0a1.jpeg', **{f'c{i}': 240})
        seen = 1 if i == 4 else i
        write(data / 'sketch' / name / 'sketch_0.JPEG', **{f'c{seen}': 240})
    # What is seen most is of another class, in ImageNet-R of one that it does not have.
    for i, wrong in {2: 5, 7: 5, 10: 11}.items():
        write(data / 'r' / WNIDS[i] / 'art_0.jpg', **{f'c{i}': 130, f'c{wrong}': 240})
    (data / 'r' / 'README.txt').write_text('as published')
    for i, wrong in {2: 3, 3: 2}.items():
        write(data / 'a' / WNIDS[i] / '0.00_x.jpg', **{f'c{i}': 130, f'c{wrong}': 240})
        write(data / 'a' / WNIDS[i] / '0.01_x.jpg', **{f'c{i}': 240, f'c{wrong}': 130})
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    dataset = dict(type='CustomDataset', data_root=str(data / 'imagenet'), pipeline=pipeline)
    pixels = dict(mean=[0, 0, 0], std=[255, 255, 255], to_rgb=True)
    cfg = dict(
        model=dict(type='ImageClassifier', backbone=dict(type='Cells'), data_preprocessor=pixels),
        evaluation={split: dict(dataset, data_prefix=split) for split in ('train', 'val')},
        default_scope='mmpretrain',
    )
    Config(cfg).dump(tmp_path / 'config.py')
    torch.save({f'backbone.{k}': v for k, v in Cells().state_dict().items()}, tmp_path / 'x.pth')

    def probe(*options):
        places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
        options = ('--k', 1, 5, '--epochs', 20, *places, *options)
        code = run_command('probe', tmp_path / 'config.py', tmp_path / 'x.pth', *options)
        return code or json.loads((tmp_path / 'out' / 'probe.json').read_text())

    return probe, data


def test_published_folders_with_a_known_answer(run, capsys):
    probe, data = run
    names = ('v2', 'r', 'a', 'sketch')
    found = probe('--also', *(f'{name}={data / name}' for name in names), '--shots', 1, 5)
    assert {result['top1'] for result in found['results'].values()} == {1}
    expected = dict(v2=(1, 12, 12), r=(1, 3, 3), a=(0.5, 4, 2), sketch=(11 / 12, 12, 12))
    for name, (top1, images, classes) in expected.items():
        some = found['also'][name]
        assert (some['images'], some['classes']) == (images, classes)
        assert some['folder'] == str(data / name)
        assert list(some['results']) == ['linear probe', '1-NN', '5-NN']
        for result in some['results'].values():
            assert result['top1'] == pytest.approx(top1)
            assert result['top1_ci'][0] <= top1 <= result['top1_ci'][1]
    few = found['few_shot']
    assert {n: list(some) for n, some in few.items()} == {'1': ['1-NN'], '5': ['1-NN', '5-NN']}
    assert few['1']['1-NN']['top1'] == [1] * 10
    text = capsys.readouterr().out
    assert '| sketch ' in text and ' 0.9167 [0.6461, 0.9851] |' in text
    assert '| 5 of each class | 5-NN | 1.0000 [1.0000, 1.0000] |' in text


def test_refusals_come_before_the_work(run, tmp_path):
    probe, data = run

    def refused(*options):
        found = probe(*options)
        assert found.startswith('error: ') and '\n' not in found
        assert not (tmp_path / 'cache').exists()
        return found

    (data / 'v2' / '11').rename(data / 'v2' / '12')
    found = refused('--also', f'v2={data / "v2"}')
    assert 'error: --also v2=' in found and 'numbers from 0 to 12' in found
    assert 'a and 4 more of its 5 folders' in refused('--also', f'x={data}')
    found = refused('--shots', 1, 6)
    assert found.startswith('error: --shots shots=6: class 0 has 5 training images')


def test_options_that_make_no_sense(capsys):
    for options, told in {
        ('--also', 'folder'): '--also folder: give NAME=FOLDER.',
        ('--shots', '0'): '--shots: 0 is not positive',
        ('--draws', '1'): '--draws 1: the interval needs two or more.',
    }.items():
        assert run_command('probe', 'a.py', 'b.pth', *options) == 2
        assert told in capsys.readouterr().err
