"""From a folder of images to a backbone, by command."""

import json
import os
import subprocess
import sys
import time

import pytest
import tifffile
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from ser_mm.datasets import LoadChannels, LoadReadableImage
from ser_mm.evaluation.backbone import build_backbone, build_model, token_maps_of
from ser_mm.evaluation.data import spaced_images
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.features import Embedder
from ser_mm.experiments.pretrain import skipped
from ser_mm.experiments.recipes import pretraining_config
from ser_mm.experiments.report import IMAGES
from tests.support.command import run_command
from tests.support.images import write_deep_images
from tests.support.paths import ROOT


def command(images, out, *more):
    args = ['--model', 'vit_tiny_patch16', '--image-size', '64', '--batch-size', '8', *more]
    script = [sys.executable, str(ROOT / 'tools/pretrain.py'), '--data', str(images), '--out']
    return [*script, str(out), *map(str, args)]


def assert_loads_elsewhere(folder, expected, channels=3):
    """timm gives the same features in a process that knows nothing of this package."""
    pixels = torch.randn(2, channels, 64, 64)
    torch.save(pixels, folder.parent / 'pixels.pth')
    late = (folder / 'ser_vit.py').exists()
    script = f"""
import sys
import timm, torch
{'import ser_vit' if late else ''}
network = timm.create_model('local-dir:{folder}', pretrained=True, num_classes=0).eval()
assert timm.data.resolve_model_data_config(network)['input_size'][0] == {channels}
with torch.no_grad():
    torch.save(network(torch.load('pixels.pth')), 'features.pth')
assert not any(x.split('.')[0] in ('ser_mm', 'mmengine', 'mmpretrain') for x in sys.modules)
"""
    paths = dict(os.environ, PYTHONPATH=str(folder))
    subprocess.run([sys.executable, '-c', script], cwd=folder.parent, check=True, env=paths)
    with torch.no_grad():
        ours = expected(pixels)
    torch.testing.assert_close(torch.load(folder.parent / 'features.pth'), ours, rtol=0, atol=1e-5)


def assert_starts_from(weights, out, before):
    """What is reported of the start is that of the weights, read without the run's init_cfg."""
    cfg = Config.fromfile(out / 'run.py')
    assert cfg.model.algorithm.backbone.pop('init_cfg')
    with token_maps_of(build_backbone(cfg, str(weights))) as token_maps:
        images = spaced_images(cfg, 'val', IMAGES)
        expected = equivariance_by_layer(token_maps, images, ['rot90'])
    for ours, theirs in zip(before['layers']['rot90'], expected['rot90'], strict=True):
        assert ours['r2'] == pytest.approx(theirs['r2'], abs=1e-5)


@pytest.mark.slow
def test_a_flat_folder_by_one_command_that_is_killed_and_repeated(images, tmp_path):
    out = tmp_path / 'out'
    whole = command(images, out, '--epochs', 6)
    first = subprocess.Popen(whole, cwd=ROOT)
    while first.poll() is None and not (out / 'run' / 'epoch_1.pth').exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not (out / 'report.html').exists()

    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [1]' not in (out / 'run.log').read_text()
    assert 'R2 after block 3' in done.stdout
    assert 'of `run.py`' in (out / 'timm' / 'README.md').read_text()
    pictures = {file.name for file in (out / 'pictures').iterdir()}
    assert pictures == {f'{x}.png' for x in ('losses', 'views', 'token_maps', 'neighbours')}
    page = (out / 'report.html').read_text()
    assert all(f'pictures/{name}' in page for name in pictures)
    found = json.loads((out / 'figures.json').read_text())
    assert set(found) == {'layers', 'before'} and set(found['before']) == {'layers'}
    assert '| untrained ' in done.stdout and found['layers'] != found['before']['layers']
    expected = Embedder(Config.fromfile(out / 'run.py'), str(out / 'run' / 'epoch_6.pth'))
    assert_loads_elsewhere(out / 'timm', expected)
    # The config is an ordinary one.
    cfg = Config.fromfile(out / 'run.py')
    assert cfg.model.type == 'SERAlgorithm' and cfg.train_cfg.max_epochs == 6

    told = run_command('pretrain', *command(images, out, '--epochs', 4)[2:])
    assert f'{out} holds a run with other settings' in told and 'another --out' in told


def test_images_left_out_of_training_are_told(tmp_path, monkeypatch):
    """Their names were in the log alone, once for each epoch."""
    logger = MMLogger.get_instance('skipping', log_file=str(tmp_path / 'run.log'))
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logger)
    files = [tmp_path / name for name in ('x.png', 'y.tif', 'x.png')]
    for file in files:
        file.write_bytes(b'no image')
    load = dict(channels=1, dtype='uint16', mean=[1.0], std=[1.0])
    for file in files:
        for loader in (LoadReadableImage(), LoadChannels(**load)):
            assert loader(dict(img_path=str(file))) is None
    found = skipped(tmp_path / 'run.log')
    assert len(found) == 4 and all(f'{tmp_path}/' in x for x in found)
    assert skipped(tmp_path / 'none.log') == []


@pytest.mark.slow
@pytest.mark.parametrize(
    'method, name',
    [('dino', 'vit_tiny_patch16'), ('byol', 'resnet18'), ('mocov3', 'timm/vit_tiny_patch16_224')],
)
def test_folders_of_classes_going_on_from_weights(images, tmp_path, method, name):
    """Every second image is in the other class; weights are those of another run."""
    data = tmp_path / 'classes'
    for number, file in enumerate(sorted(images.iterdir(), key=lambda x: int(x.stem))):
        target = data / 'ab'[number % 2] / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
    model = build_model(pretraining_config(images, tmp_path / 'out', model=name, image_size=64))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    out = tmp_path / 'out'
    more = ['--method', method, '--epochs', 1, '--weights', tmp_path / 'weights.pth']
    whole = [*command(data, out, *more), '--model', name]
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'figures.json').read_text())
    assert all(0 <= found[key] <= 1 for key in ('probe', 'probe_turned', 'knn'))
    assert 'k-NN' in (out / 'report.html').read_text()
    assert_starts_from(tmp_path / 'weights.pth', out, found['before'])
    expected = Embedder(Config.fromfile(out / 'run.py'), str(out / 'run' / 'epoch_1.pth'))
    assert_loads_elsewhere(out / 'timm', expected)
    after = torch.load(out / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    ours = {k: v for k, v in model.state_dict().items() if k.startswith('backbone.') and v.ndim > 1}
    # Four steps of Adam or LARS at learning rates below 1e-3 of the shipped ones move a weight by
    # less than a tenth of what random weights differ by.
    moved = sum((after[key] - value).norm() ** 2 for key, value in ours.items()).sqrt()
    assert moved < 0.1 * sum(value.norm() ** 2 for value in ours.values()).sqrt()


@pytest.mark.slow
def test_images_of_five_channels_of_16_bits(tmp_path):
    write_deep_images(tmp_path / 'data', 24, 5)
    out = tmp_path / 'out'
    whole = command(tmp_path / 'data', out, '--epochs', 1)
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'images of 5 channels of uint16, mean ' in done.stdout
    assert 'Skipped' not in (out / 'run.log').read_text()
    assert 'R2 after block 3' in (out / 'report.html').read_text()
    embedder = Embedder(Config.fromfile(out / 'run.py'), str(out / 'run' / 'epoch_1.pth'))
    assert_loads_elsewhere(out / 'timm', embedder, 5)
    card = (out / 'timm' / 'README.md').read_text()
    assert '- Images: 5 channels, 64 x 64, mean [' in card and 'of values of uint16' in card
    # An array is as a file that holds it.
    file = tmp_path / 'data' / '0.tif'
    ours = embedder.embed([file, tifffile.imread(file)])
    torch.testing.assert_close(ours[0], ours[1])
