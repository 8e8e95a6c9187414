"""Known scores from folders of ImageNet-C and ImageNet-P as published."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn

from tests.support.command import run_command

CLASSES = ('n0', 'n1', 'n2')
LEVELS = (40, 120, 200)  # of grey, one per class; decoders differ by a few at most


@MODELS.register_module(force=True)
class MeanGrey(nn.Module):
    """The level of grey as a feature in which the classes can be told linearly."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(LEVELS) / 255)

    def forward(self, x):
        return (-100 * (x.mean(dim=(1, 2, 3))[:, None] - self.levels) ** 2,)

    def init_weights(self):
        pass


def grey(level, size=32):
    return np.full((size, size, 3), level, np.uint8)


def write_images(folder, levels):
    """One JPEG per class; the level tells which class will be seen."""
    for name, level in zip(CLASSES, levels, strict=True):
        (folder / name).mkdir(parents=True)
        Image.fromarray(grey(level)).save(folder / name / 'ILSVRC2012_val_1.JPEG')


def write_videos(folder, levels):
    """One video per class, its frames in the given levels."""
    for name, frames in zip(CLASSES, levels, strict=True):
        (folder / name).mkdir(parents=True)
        path = str(folder / name / 'ILSVRC2012_val_1.mp4')
        video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*'mp4v'), 1, (32, 32))
        for level in frames:
            video.write(grey(level))
        video.release()


@pytest.fixture
def config(tmp_path):
    for split in ('train', 'val'):
        write_images(tmp_path / 'data' / split, LEVELS)
    for name in CLASSES:  # more to choose the learning rate by
        image = tmp_path / 'data' / 'train' / name / 'ILSVRC2012_val_1.JPEG'
        for i in range(9):
            image.with_name(f'{i}.JPEG').write_bytes(image.read_bytes())
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=64, edge='short'),  # not of the published images
        dict(type='CenterCrop', crop_size=32),
        dict(type='PackInputs'),
    ]
    dataset = dict(type='CustomDataset', data_root=str(tmp_path / 'data'), pipeline=pipeline)
    model = dict(type='ImageClassifier', backbone=dict(type='MeanGrey'))
    pixels = dict(mean=[0, 0, 0], std=[255, 255, 255], to_rgb=True)
    cfg = dict(
        model=dict(model, data_preprocessor=pixels),
        evaluation={split: dict(dataset, data_prefix=split) for split in ('train', 'val')},
        custom_imports=dict(imports=['ser_mm']),
        default_scope='mmpretrain',
    )
    Config(cfg).dump(tmp_path / 'config.py')
    torch.save({f'backbone.{k}': v for k, v in MeanGrey().state_dict().items()}, tmp_path / 'x.pth')
    return tmp_path / 'config.py'


def robustness(tmp_path, *options):
    places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
    code = run_command('robustness', tmp_path / 'config.py', tmp_path / 'x.pth', *places, *options)
    if code is None:
        return json.loads((tmp_path / 'out' / 'robustness.json').read_text())
    return code


def test_published_folders_with_a_known_answer(config, tmp_path, capsys):
    dark, middle, bright = LEVELS
    c, p = tmp_path / 'c', tmp_path / 'p'
    for severity in range(1, 6):  # one of three wrong from severity 3 on
        write_images(c / 'fog' / str(severity), (dark, middle, bright if severity < 3 else dark))
        if severity != 4:
            write_images(c / 'snow' / str(severity), LEVELS)
    steady = [[level] * 4 for level in LEVELS]
    write_videos(p / 'brightness', [[dark, dark, middle, middle], *steady[1:]])
    write_videos(p / 'gaussian_noise', [[dark, dark, middle, middle], *steady[1:]])
    results = robustness(tmp_path, '--imagenet-c', c, '--imagenet-p', p)
    assert results['clean'] == 1

    result = results['imagenet_c']
    assert result['errors'] == {'fog': pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])}
    assert result['CE'] == {'fog': pytest.approx(0.2 / 0.819324)}
    assert 'snow/4' in result['missing'] and 'snow/3' not in result['missing']
    assert len(result['missing']) == 1 + 13 * 5
    result = results['imagenet_p']
    assert result['top1'] == pytest.approx(dict(brightness=10 / 12, gaussian_noise=10 / 12))
    assert result['flips'] == pytest.approx(dict(brightness=1 / 9, gaussian_noise=2 / 9))
    assert result['FR']['brightness'] == pytest.approx(1 / 9 / 0.0489)
    text = capsys.readouterr().out
    assert 'as published' in text and 'snow/4' in text and 'No mFR without shot_noise' in text

    (c / 'fog' / '2' / 'n1' / 'ILSVRC2012_val_1.JPEG').unlink()
    result = robustness(tmp_path, '--imagenet-c', c)['imagenet_c']
    assert result['errors'] == {} and 'fog/2 (2 of 3 images)' in result['missing']

    write_videos(p / 'tilt', [[dark] * 4, [dark] * 3, [dark] * 4])
    code = robustness(tmp_path, '--imagenet-c', c, '--imagenet-p', p)
    assert 'n1/ILSVRC2012_val_1.mp4 has 3 readable frames, the first video 4' in code

    shutil.rmtree(p / 'tilt')
    (c / 'fog' / '5' / 'n2').rename(c / 'fog' / '5' / 'n3')
    code = robustness(tmp_path, '--imagenet-c', c)
    assert code.startswith('error: fog/5') and 'n2 and 1 more are in one only' in code


def test_corruptions_on_the_fly_are_labelled(config, tmp_path, capsys):
    results = robustness(tmp_path, '--corruptions', 'brightness', 'contrast')
    assert 'on the fly' in results['imagenet_c']['source']
    assert list(results['imagenet_c']['errors']) == ['brightness', 'contrast']
    text = capsys.readouterr().out
    assert 'No mCE without gaussian_noise' in text and 'ImageNet-P: not measured' in text
