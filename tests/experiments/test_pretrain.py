"""From a folder of images to a backbone: the config that is made, and the whole way by command."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
import skimage.data
import timm
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS
from PIL import Image
from safetensors.torch import save_file

from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.features import Embedder
from ser_mm.experiments.pretrain import BACKBONES, choose_batch_size, pretraining_config
from tests.support.command import run_command
from tests.support.paths import ROOT


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Forty JPEGs of odd sizes in a flat folder with a space in its name."""
    folder = tmp_path_factory.mktemp('data') / 'my images'
    folder.mkdir()
    rng = random.Random(0)
    photos = [Image.fromarray(getattr(skimage.data, x)()) for x in ('astronaut', 'coffee')]
    for number in range(40):
        photo = photos[number % 2]
        x, y = (rng.randint(0, side - 200) for side in photo.size)
        width, height = rng.randint(61, 199), rng.randint(61, 199)
        photo.crop((x, y, x + width, y + height)).save(folder / f'{number}.jpg')
    return folder


def config(images, tmp_path, **options):
    options = {'model': 'vit_tiny_patch16', 'method': 'mocov3', 'image_size': 64, **options}
    return pretraining_config(images, tmp_path / 'out', **options)


def test_a_config_fits_images_and_machine(images, tmp_path):
    cfg = config(images, tmp_path, batch_size=8, epochs=20)
    assert cfg.train_dataloader.batch_size == 8
    assert cfg.train_dataloader.dataset.pipeline[1].equi_ratio == 2 / 8
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2.4e-3 * 8 / 2048)
    assert [x.end for x in cfg.param_scheduler] == [10, 20]  # the warm-up keeps its length
    views = cfg.train_dataloader.dataset.pipeline[1].transforms
    assert [view[0].scale for view in views] == [64, 64]
    assert [x.get('scale', x.get('crop_size')) for x in cfg.evaluation.val.pipeline[1:3]] == [
        73,
        64,
    ]
    assert not cfg.evaluation.val.with_label
    assert config(images, tmp_path, batch_size=16, epochs=5).param_scheduler[-1].end == 5
    large = choose_batch_size(10**6)
    assert large >= 64 and choose_batch_size(40) == 5 and choose_batch_size(10**6, 4) == 4 * large


@pytest.mark.parametrize('name', BACKBONES)
def test_every_backbone_has_its_width(images, tmp_path, name):
    algorithm = config(images, tmp_path, model=name).model.algorithm
    built = MODELS.build(algorithm.backbone)
    width = built.feat_dim if name.startswith('resnet') else built.embed_dims
    assert algorithm.neck.in_channels == width


@pytest.mark.parametrize('name', ['vit_tiny_patch16', 'timm/vit_tiny_patch16_224'])
def test_weights_of_timm_are_gone_on_from(images, tmp_path, name):
    """They have [CLS] from the input."""
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=0)
    save_file(theirs.state_dict(), tmp_path / 'timm.safetensors')
    cfg = config(images, tmp_path, model=name, weights=tmp_path / 'timm.safetensors')
    backbone = MODELS.build(cfg.model.algorithm.backbone)
    backbone.init_weights()
    assert (backbone.ser_layer, backbone.cls_layer) == (3, 0)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, expected = backbone.eval()(pixels)[-1], theirs.eval()(pixels)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(model='vit_tiny'), '--model vit_tiny: choose vit_tiny_patch16'),
        (dict(model='timm/vit_tiny'), 'is not in timm'),
        (dict(model='timm/convnext_tiny'), '--model timm/convnext_tiny has no recipe'),
        (dict(method='simclr'), '--method simclr: choose one of mocov3'),
        (dict(model='resnet50', method='dino'), '--method dino has no recipe for --model resnet50'),
        (dict(image_size=60), '--image-size 60: a token .* 16 pixels; choose a multiple of 16'),
        (dict(batch_size=41), 'has 40 images .* fewer than a batch of 41; .* --batch-size to 40'),
        (dict(batch_size=2), '--batch-size 2: .* four or more; choose 4'),
        (dict(batch_size=10, devices=4), '--batch-size 10: each of 4 devices .* choose 16'),
        (dict(weights='no.pth'), '--weights no.pth is not a file'),
    ],
)
def test_what_does_not_do_is_one_sentence(images, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        config(images, tmp_path, **options)
    assert not (tmp_path / 'out').exists()


def command(images, out, *more):
    args = ['--model', 'vit_tiny_patch16', '--image-size', '64', '--batch-size', '8', *more]
    script = [sys.executable, str(ROOT / 'tools/pretrain.py'), '--data', str(images), '--out']
    return [*script, str(out), *map(str, args)]


def assert_loads_elsewhere(folder, expected):
    """timm gives the same features in a process that knows nothing of this package."""
    pixels = torch.randn(2, 3, 64, 64)
    torch.save(pixels, folder.parent / 'pixels.pth')
    late = (folder / 'ser_vit.py').exists()
    script = f"""
import sys
import timm, torch
{'import ser_vit' if late else ''}
network = timm.create_model('local-dir:{folder}', pretrained=True, num_classes=0).eval()
assert timm.data.resolve_model_data_config(network)['input_size'][0] == 3
with torch.no_grad():
    torch.save(network(torch.load('pixels.pth')), 'features.pth')
assert not any(x.split('.')[0] in ('ser_mm', 'mmengine', 'mmpretrain') for x in sys.modules)
"""
    paths = dict(os.environ, PYTHONPATH=str(folder))
    subprocess.run([sys.executable, '-c', script], cwd=folder.parent, check=True, env=paths)
    with torch.no_grad():
        ours = expected(pixels)
    torch.testing.assert_close(torch.load(folder.parent / 'features.pth'), ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_flat_folder_by_one_command_that_is_killed_and_repeated(images, tmp_path):
    out = tmp_path / 'out'
    whole = command(images, out, '--epochs', 3)
    first = subprocess.Popen(whole, cwd=ROOT)
    while first.poll() is None and not (out / 'run' / 'epoch_1.pth').exists():
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert not (out / 'report.html').exists()

    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [1]' not in (out / 'run.log').read_text()
    assert '15 steps' in done.stdout and 'R2 after block 3' in done.stdout
    pictures = {file.name for file in (out / 'pictures').iterdir()}
    assert pictures == {f'{x}.png' for x in ('losses', 'views', 'token_maps', 'neighbours')}
    page = (out / 'report.html').read_text()
    assert all(f'pictures/{name}' in page for name in pictures)
    assert set(json.loads((out / 'figures.json').read_text())) == {'layers'}
    expected = Embedder(Config.fromfile(out / 'run.py'), str(out / 'run' / 'epoch_3.pth'))
    assert_loads_elsewhere(out / 'timm', expected)
    # The config is an ordinary one.
    cfg = Config.fromfile(out / 'run.py')
    assert cfg.model.type == 'SERAlgorithm' and cfg.train_cfg.max_epochs == 3

    told = run_command('pretrain', *command(images, out, '--epochs', 4)[2:])
    assert f'{out} holds a run with other settings' in told and 'ser-mm train' in told


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
    model = build_model(config(images, tmp_path, model=name))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    out = tmp_path / 'out'
    more = ['--method', method, '--epochs', 1, '--weights', tmp_path / 'weights.pth']
    whole = [*command(data, out, *more), '--model', name]
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'figures.json').read_text())
    assert all(0 <= found[key] <= 1 for key in ('probe', 'probe_turned', 'knn'))
    assert 'k-NN' in (out / 'report.html').read_text()
    expected = Embedder(Config.fromfile(out / 'run.py'), str(out / 'run' / 'epoch_1.pth'))
    assert_loads_elsewhere(out / 'timm', expected)
    after = torch.load(out / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    ours = {k: v for k, v in model.state_dict().items() if k.startswith('backbone.') and v.ndim > 1}
    # Four steps of Adam or LARS at learning rates below 1e-3 of the shipped ones move a weight by
    # less than a tenth of what random weights differ by.
    moved = sum((after[key] - value).norm() ** 2 for key, value in ours.items()).sqrt()
    assert moved < 0.1 * sum(value.norm() ** 2 for value in ours.values()).sqrt()
