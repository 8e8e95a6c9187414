"""Detectors on pretrained backbones, by ser-mm train and test, and by MMDetection's own tools."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ser_mm.datasets import write_bundled_digits
from ser_mm.evaluation.backbone import build_model
from ser_mm.views import ViewBatch
from tests.support.command import run_command
from tests.support.detection import (
    assert_same_weights,
    backbone_weights,
    load,
    make_small,
    on_digits,
    with_classes,
)
from tests.support.paths import ROOT

PATH = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A COCO data set of four training and two validation images, 96 x 96."""
    root = tmp_path_factory.mktemp('coco') / 'digits'
    write_bundled_digits(root, num_train=4, num_val=2, size=96)
    return root


@pytest.fixture(autouse=True)
def detection_scope():
    init_default_scope('mmdet')


def python(*args, check=True):
    command = [sys.executable, *map(str, args)]
    env = os.environ | dict(PYTHONPATH=str(ROOT))  # MMDetection's tools look elsewhere
    return subprocess.run(command, cwd=ROOT, env=env, check=check, text=True, stdout=-1, stderr=-2)


def ser_mm(name, *args, check=True):
    """A command in a process of its own, as a Runner leaves much behind."""
    return python('-m', f'ser_mm.cli.{name}', *args, check=check)


def dump(cfg, folder):
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_dataloader.dataset.ann_file=none.json', "ann_file = 'none.json'"),
        ('model.roi_head.bbox_head.num_classes=11', 'bbox_head.num_classes = 11'),
    ],
)
def test_train_tells_bad_data_in_one_line(digits, tmp_path, option, message):
    cfg = with_classes(load('faster-rcnn_vits16', **on_digits(digits)), 10)
    args = [dump(cfg, tmp_path), '--work-dir', tmp_path / 'run', '--cfg-options', option]
    sentence = run_command('train', *args)
    assert sentence.startswith('error: ') and message in sentence and '\n' not in sentence
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def pretrained(imagenet_tree, tmp_path_factory):
    """What ``ser-mm train ser_mocov3_vits16`` leaves after two steps."""
    work_dir = tmp_path_factory.mktemp('pretrained')
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=8',
        'train_dataloader.num_workers=0',
        f'train_dataloader.dataset.data_root={imagenet_tree}',
        'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
    ]
    ser_mm('train', 'ser_mocov3_vits16', '--work-dir', work_dir, '--cfg-options', *options)
    return work_dir / 'epoch_1.pth'


@pytest.mark.slow
def test_pretraining_checkpoint_fills_the_detector_and_gives_the_same_maps(pretrained):
    cfg = load('faster-rcnn_vits16')
    cfg.model.backbone.init_cfg.checkpoint = str(pretrained)
    detector = DETECTORS.build(cfg.model)
    detector.init_weights()
    detector.eval()
    content = torch.load(pretrained, weights_only=False)['state_dict']
    weights = {k.removeprefix('backbone.'): v for k, v in content.items() if 'backbone.' in k[:9]}
    assert_same_weights(detector.backbone, weights)

    init_default_scope('mmpretrain')
    algorithm = build_model(Config.fromfile(ROOT / 'configs' / 'ser_mocov3_vits16.py'))
    algorithm.load_state_dict(content)
    algorithm.eval()
    bgr = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    theirs = algorithm.data_preprocessor(dict(inputs=bgr, data_samples=None))['inputs']
    ours = detector.data_preprocessor(
        dict(inputs=list(bgr), data_samples=[mmdet.structures.DetDataSample()])
    )['inputs']
    torch.testing.assert_close(ours, theirs)  # two operations of float32

    x = theirs.double()
    views = ViewBatch(base=x[:0], equi=x, elements=torch.zeros(1, dtype=torch.int64))
    online, backbone = algorithm.backbone.double(), detector.backbone.double()
    close = dict(rtol=1e-9, atol=1e-9)  # as for the tiny networks, which tests/models check
    with torch.no_grad():
        online(views)
        online.out_type = backbone.out_type
        torch.testing.assert_close(backbone(x)[0], online(x)[0], **close)
        backbone.out_indices = [online.ser_layer - 1]
        torch.testing.assert_close(backbone(x)[0], views.token_maps[online], **close)


@pytest.mark.slow
def test_commands_train_and_test_a_detector(digits, tmp_path):
    cfg = make_small(load('faster-rcnn_vits16', **on_digits(digits)), tmp_path / 'start.pth')
    config = dump(cfg, tmp_path)
    mmdet_tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    python(mmdet_tools / 'train.py', config, '--work-dir', tmp_path / 'mmdet')
    ser_mm('train', config, '--work-dir', tmp_path / 'ours')
    checkpoint = tmp_path / 'ours' / 'epoch_1.pth'
    logged = (tmp_path / 'ours').glob('*/vis_data/scalars.json')
    trained = re.findall(r'"coco/bbox_mAP": ([\d.]+)', next(logged).read_text())[-1]

    test = ['test', config, checkpoint, '--work-dir', tmp_path / 'test']
    out = ser_mm(*test, '--out', tmp_path / 'out.pkl', '--show-dir', 'shown').stdout
    tested = re.findall(r'coco/bbox_mAP: ([\d.]+)', out)[-1]
    assert float(tested) == pytest.approx(float(trained), abs=1e-3)  # printed to 4 places
    assert (tmp_path / 'out.pkl').stat().st_size > 0
    assert len(list((tmp_path / 'test').glob('*/shown/*.png'))) == 2
    assert 'coco/bbox_mAP' in ser_mm(*test, '--tta').stdout

    weights = torch.load(checkpoint, weights_only=False)
    del weights['state_dict']['neck.levels.0.0.weight']
    torch.save(weights, checkpoint)
    out = ser_mm(*test, check=False)
    assert out.returncode != 0 and 'neck.levels.0.0.weight' in out.stdout


@pytest.mark.slow
def test_distributed_tools_run_a_detector(digits, tmp_path):
    cfg = make_small(load('faster-rcnn_vits16', **on_digits(digits)), tmp_path / 'start.pth')
    config = dump(cfg, tmp_path)
    for script, arguments in {
        'dist_train.sh': [config, 2],
        'dist_test.sh': [config, tmp_path / 'run' / 'epoch_1.pth', 2],
    }.items():
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        out = subprocess.run(
            ['bash', f'tools/{script}', *map(str, arguments), '--work-dir', str(tmp_path / 'run')],
            cwd=ROOT,
            text=True,
            stdout=-1,
            stderr=-2,
            env={'VIRTUAL_ENV': sys.prefix, **os.environ, 'PORT': port, 'PATH': PATH},
        )
        assert out.returncode == 0, out.stdout[-3000:]
        assert 'coco/bbox_mAP' in out.stdout
    weights = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    start = backbone_weights(tmp_path / 'start.pth')
    assert all(torch.equal(weights[f'backbone.{key}'], value) for key, value in start.items())
