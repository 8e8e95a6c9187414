"""Files and folders that other libraries load: what is in them, and when none is written."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmpretrain.models import ResNet, VisionTransformer
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image

from ser_mm.checkpoint import load_backbone
from ser_mm.engine.configs import find_config
from ser_mm.evaluation import Embedder
from ser_mm.evaluation.conversion import to_onnx, to_timm
from ser_mm.evaluation.export import data_config, export_backbone
from tests.support.algorithms import BACKBONE
from tests.support.exported import (
    CLOSE,
    VIT,
    checkpoint,
    config,
    feature,
    images,
    load,
)


@pytest.mark.parametrize('name', ['ours', 'timm'])
@pytest.mark.parametrize('cls_layer', [0, 2])
@torch.no_grad()
def test_programs_with_a_dynamic_batch(name, cls_layer, tmp_path):
    cfg = config(dict(cls_layer=cls_layer, arch=dict(BACKBONE['arch'], num_layers=3)))
    path, network = checkpoint(cfg, tmp_path)
    if name == 'timm':
        network = to_timm(network.float())[0].double()
    x, others = images(32, 32), torch.cat([images(32, 32)] * 3)
    batch = torch.export.Dim('batch')
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},)).module()
    traced = torch.jit.trace(network, x, check_trace=False)
    for found in (program(others), traced(others)):
        expected = network(others)
        found = found if name == 'timm' else found[-1]
        expected = expected if name == 'timm' else expected[-1]
        torch.testing.assert_close(found, expected, **CLOSE)


TIMM = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2)
TWO_BLOCKS = dict(arch=dict(BACKBONE['arch'], num_layers=2))
# Backbones by name, and whether they take RGB.
NETWORKS = {
    'late [CLS]': (VIT | TWO_BLOCKS | dict(cls_layer=1), True),
    'plain ViT': (VIT | TWO_BLOCKS, False),
    'ResNet': (dict(type='SERResNet', depth=18, stem_channels=8, base_channels=8), True),
    'ViT of timm': (
        dict(type='SERTimmViT', model='vit_tiny_patch16_224', model_args=TIMM, cls_layer=1),
        True,
    ),
}
# Sums of up to 576 products in float32, 20 in a row, if all their errors were of one sign.
FLOAT32 = 576 * 20 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(x, marks=() if 'plain' in x or '[CLS]' in x else pytest.mark.slow)
        for x in NETWORKS
    ],
)
@torch.no_grad()
def test_onnx_with_a_dynamic_batch(name, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    backbone, to_rgb = NETWORKS[name]
    cfg = config(dict(), to_rgb=to_rgb)
    cfg.model.backbone = backbone
    path, network = checkpoint(cfg, tmp_path)
    usage = export_backbone(cfg, path, tmp_path / 'x.onnx', 'onnx')
    assert sorted(x.name for x in tmp_path.iterdir()) == ['run.pth', 'x.onnx']
    data = data_config(cfg, network)
    rng = torch.Generator().manual_seed(1)
    for count in (1, 5):
        x = torch.randn(count, *data['input_size'], generator=rng)
        names = dict(images=x.numpy())
        exec(usage, names)
        expected = feature(network, (x if to_rgb else x.flip(1)).double())
        close = dict(rtol=0, atol=FLOAT32 * float(expected.abs().max()))
        torch.testing.assert_close(torch.from_numpy(names['features']).double(), expected, **close)
    assert names['data'] == data
    (fed,) = runtime.InferenceSession(tmp_path / 'x.onnx').get_inputs()
    assert fed.name == 'images' and fed.shape[1:] == data['input_size'] == [3, 32, 32]


class Noisy(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand_like(x).flatten(1)


class Chooses(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


def test_what_onnx_has_no_program_for_is_refused():
    pytest.importorskip('onnxscript')
    with pytest.raises(ValueError, match='Noisy has outputs that differ for 1 images, which ONNX'):
        to_onnx(Noisy(), (3, 8, 8))
    with pytest.raises(ValueError, match='Chooses has operations that torch cannot export'):
        to_onnx(Chooses(), (3, 8, 8))
    network = torch.nn.Linear(8, 1)
    network.bias.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='bias of the checkpoint has values that are infinite'):
        to_onnx(network, (3, 8, 8))


@pytest.mark.parametrize('to_rgb', [True, False])
@torch.no_grad()
def test_data_config_and_channel_order(to_rgb, tmp_path):
    """A file that timm prepares by itself has the features that the evaluations give it.

    It is as large as the edge, so nothing is resized.
    """
    cfg = config(dict(cls_layer=2), to_rgb=to_rgb)
    path, _ = checkpoint(cfg, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    expected = Embedder(cfg, path).embed(tmp_path / 'image.png')
    export_backbone(cfg, path, tmp_path / 'timm')
    network = load(tmp_path / 'timm').float()
    data = timm.data.resolve_model_data_config(network)
    assert data['input_size'] == (3, 32, 32) and data['interpolation'] == 'bilinear'
    order = slice(None) if to_rgb else slice(None, None, -1)
    assert data['mean'] == pytest.approx((0.485, 0.456, 0.406)[order])
    assert data['std'] == pytest.approx((0.229, 0.224, 0.225)[order])
    transform = timm.data.create_transform(**data)
    found = network(transform(Image.open(tmp_path / 'image.png'))[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['mocov3_cifar10', 'mocov3_stl10'])
@torch.no_grad()
def test_channels_of_data_sets_that_hold_pixels_stay(name, tmp_path):
    """They hold RGB, which nothing turns."""
    cfg = Config.fromfile(find_config(f'small_images/{name}'))
    small = dict(arch=BACKBONE['arch'], img_size=32, patch_size=8)
    cfg.model.backbone.update(small)
    path, network = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    exported = load(tmp_path / 'timm')
    x = images(32, 32)
    torch.testing.assert_close(exported(x), network(x)[-1], **CLOSE)
    pixels = cfg.model.data_preprocessor
    mean = timm.data.resolve_model_data_config(exported)['mean']
    assert mean == pytest.approx([value / 255 for value in pixels.mean], abs=1e-6)


def test_data_config_of_other_configs():
    cfg = Config.fromfile(find_config('mocov3_r50'))
    data = data_config(cfg, MODELS.build(dict(type='SERResNet', depth=18)))
    assert data['crop_pct'] == 0.875 and data['input_size'] == [3, 224, 224]
    cfg.evaluation.val.pipeline[1].scale = 235
    pct = data_config(cfg, MODELS.build(dict(type='SERResNet', depth=18)))['crop_pct']
    assert int(224 / pct) == 235
    cfg = config(dict(), mean=None, std=None)
    data = data_config(cfg, MODELS.build(VIT))
    assert data['crop_mode'] == 'center' and data['crop_pct'] == 0.8
    assert data['mean'] == [0, 0, 0] and data['std'] == pytest.approx([1 / 255] * 3)


RESIZES = {
    'ResizeEdge': (dict(type='ResizeEdge', scale=40, backend='pillow'), 'bilinear'),
    'FastResizeEdge': (dict(type='FastResizeEdge', scale=40, interpolation='bicubic'), 'bicubic'),
    'Resize': (dict(type='Resize', scale=(32, 32), backend='pillow'), 'bilinear'),
    'Resize to more': (
        dict(type='Resize', scale=(40, 40), backend='pillow', interpolation='bicubic'),
        'bicubic',
    ),
}


@pytest.mark.parametrize('name', RESIZES)
def test_timm_resizes_as_the_config_does(name):
    """A filter that is not named is bilinear, and Resize does not keep the ratio of the sides."""
    resize, mode = RESIZES[name]
    cfg = config(dict())
    cfg.evaluation.val.pipeline[1] = resize
    data = data_config(cfg, MODELS.build(VIT))
    assert data['interpolation'] == mode
    smooth = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    ours = dict(img=smooth)
    for transform in cfg.evaluation.val.pipeline[1:3]:
        ours = TRANSFORMS.build(transform)(ours)
    prepare = timm.data.create_transform(**data)
    theirs = prepare(Image.fromarray(smooth)) * torch.tensor(data['std']).view(3, 1, 1)
    theirs = 255 * (theirs + torch.tensor(data['mean']).view(3, 1, 1))
    # Both round to whole values, in two passes; where one squashed and the other did not, or cut
    # other edges off, the columns were tens apart.
    assert np.abs(ours['img'] - theirs.permute(1, 2, 0).numpy()).max() < 2.5


def test_data_config_of_pipelines_with_resize():
    """Of a network that takes any size."""
    network = MODELS.build(dict(type='SERResNet', depth=18))
    cfg = config(dict(type='SERResNet', depth=18))
    pipeline = cfg.evaluation.val.pipeline

    def found(*transforms):
        cfg.evaluation.val.pipeline = [pipeline[0], *transforms, pipeline[-1]]
        data = data_config(cfg, network)
        return *data['input_size'][1:], data['crop_pct'], data['crop_mode']

    crop = dict(type='CenterCrop', crop_size=224)
    assert found(dict(type='Resize', scale=(128, 64))) == (64, 128, 1.0, 'squash')
    assert found(dict(type='Resize', scale=(256, 256)), crop) == (224, 224, 0.875, 'squash')
    fits = dict(type='Resize', scale=(256, 256), keep_ratio=True)
    assert found(fits, crop) == (224, 224, 1.0, 'center')
    edge = dict(type='ResizeEdge', scale=256)
    for other in (fits, dict(type='Resize', scale=(300, 300))):
        assert found(other, edge, crop) == (224, 224, 0.875, 'center')


@pytest.mark.parametrize('to', ['mmpretrain', 'torchvision', 'onnx'])
def test_a_file_that_is_there_is_left_alone(to, tmp_path):
    """A checkpoint of another run was replaced, in silence."""
    (tmp_path / 'epoch_100.pth').write_text('weeks of work')
    cfg = config(dict(type='SERResNet', depth=18))
    with pytest.raises(FileExistsError, match='epoch_100.pth is there already; remove it, or'):
        export_backbone(cfg, 'run.pth', tmp_path / 'epoch_100.pth', to)
    assert (tmp_path / 'epoch_100.pth').read_text() == 'weeks of work'


VIT_FOR_SER = dict(ser_layer=2, cls_layer=0, stop_grad_conv1=True)


@pytest.mark.parametrize(
    'options, kind, suffix',
    [
        (VIT_FOR_SER, VisionTransformer, '.pth'),
        (VIT_FOR_SER, VisionTransformer, '.safetensors'),
        (dict(type='SERResNet', depth=18, ser_layer=3), ResNet, '.pth'),
    ],
)
@torch.no_grad()
def test_mmpretrain_loads_its_own_class(options, kind, suffix, tmp_path):
    cfg = config(options)
    path, ours = checkpoint(cfg, tmp_path)
    usage = export_backbone(cfg, path, tmp_path / f'plain{suffix}', 'mmpretrain')
    names: dict = {}
    exec(usage, names)
    if suffix == '.safetensors':  # which MMEngine does not read
        names['backbone']['init_cfg'] = None
    theirs = MODELS.build(names['backbone'])
    theirs.init_weights()
    assert type(theirs) is kind
    if suffix == '.safetensors':
        load_backbone(theirs, str(tmp_path / 'plain.safetensors'))
    theirs.double().train(False)
    x = images(32, 32)
    torch.testing.assert_close(theirs(x)[-1], ours(x)[-1], **CLOSE)


def test_one_channel(tmp_path):
    cfg = config(dict(in_channels=1), mean=[120.0], std=[60.0], to_rgb=False)
    path, ours = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    network = load(tmp_path / 'timm')
    x = images(32, 32, channels=1)
    torch.testing.assert_close(network(x), ours(x)[-1], **CLOSE)
    assert timm.data.resolve_model_data_config(network)['input_size'] == (1, 32, 32)


REFUSED = {
    'ViT to torchvision': (dict(), 'torchvision', 'type=SERVisionTransformer .*only a ResNet'),
    'late [CLS] to MMPretrain': (dict(cls_layer=2), 'mmpretrain', 'cls_layer=2, a late .CLS.'),
    'not the last block': (dict(out_indices=[1]), 'timm', r'out_indices=\[1\]'),
    'eps': (dict(norm_cfg=dict(type='LN')), 'timm', 'eps=1e-05'),
    'another activation': (
        dict(layer_cfgs=dict(act_cfg=dict(type='ReLU'))),
        'timm',
        'outputs that differ by',
    ),
    'overlapping patches': (dict(patch_cfg=dict(stride=4, padding=2)), 'timm', 'in steps of'),
    'deep stem': (dict(type='SERResNet', depth=18, deep_stem=True), 'timm', 'deep_stem=True'),
    'caffe': (
        dict(type='SERResNet', depth=50, base_channels=4, style='caffe'),
        'torchvision',
        'style=caffe',
    ),
    'GroupNorm': (
        dict(type='SERResNet', depth=18, norm_cfg=dict(type='GN', num_groups=4)),
        'timm',
        'norm_cfg.type=GN',
    ),
    'early stage': (dict(type='ResNet', depth=18, out_indices=(2,)), 'timm', 'out_indices'),
    'another network': (dict(type='ConvNeXt', depth=0, arch='atto'), 'timm', 'type=ConvNeXt'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_a_library_has_no_network_for_is_refused(name, tmp_path):
    options, to, message = REFUSED[name]
    if options.get('type') == 'ConvNeXt':
        options = {key: value for key, value in options.items() if key != 'depth'}
        cfg = config(dict())
        cfg.model.backbone = options
    else:
        cfg = config(options)
    path, _ = checkpoint(cfg, tmp_path)
    with pytest.raises(ValueError, match=message):
        export_backbone(cfg, path, tmp_path / 'out', to)
    assert not (tmp_path / 'out').exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    cfg = config(dict())
    path, network = checkpoint(cfg, tmp_path)
    network.ln1.bias.data[0] = float('nan')
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match='norm.bias .*NaN'):
        export_backbone(cfg, path, tmp_path / 'out')


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    cfg = config(dict())
    path, _ = checkpoint(cfg, tmp_path)
    out = tmp_path / 'out'
    out.mkdir()
    export_backbone(cfg, path, out)  # an empty folder is fine, and so is an earlier export
    before = {x.name: x.read_bytes() for x in out.iterdir()}
    assert set(before) == {'README.md', 'config.json', 'model.safetensors'}
    export_backbone(
        config(dict(cls_layer=1)), checkpoint(config(dict(cls_layer=1)), tmp_path)[0], out
    )
    assert (out / 'ser_vit.py').exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ['out', 'run.pth']
    (out / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='out holds notes.txt'):
        export_backbone(cfg, path, out)
    (out / 'notes.txt').unlink()
    text = json.loads((out / 'config.json').read_text())
    del text['exported_by']
    (out / 'config.json').write_text(json.dumps(text))
    with pytest.raises(FileExistsError, match='no earlier export'):
        export_backbone(cfg, path, out)
    with pytest.raises(FileExistsError, match='is a folder'):
        export_backbone(cfg, path, out, 'torchvision')
    with pytest.raises(FileExistsError, match='is a file'):
        export_backbone(cfg, path, path)
    with pytest.raises(FileExistsError, match='the checkpoint itself'):
        export_backbone(cfg, path, path, 'mmpretrain')


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    cfg = config(dict())
    path, _ = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'out')
    before = {x.name: x.read_bytes() for x in (tmp_path / 'out').iterdir()}

    def fail(*args):
        raise OSError('no space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='no space'):
        export_backbone(cfg, path, tmp_path / 'out')
    assert {x.name: x.read_bytes() for x in (tmp_path / 'out').iterdir()} == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ['out', 'run.pth']


ALONE = """
import sys, torch
{usage}
x = torch.load(sys.argv[1])
with torch.no_grad():
    found = network.double().eval()(x['images'])
assert not {{'ser_mm', 'mmengine', 'mmcv', 'mmpretrain'}} & set(sys.modules)
torch.testing.assert_close(found, x['features'], rtol=1e-10, atol=1e-10)
"""


@pytest.mark.slow
@pytest.mark.parametrize('cls_layer', [0, 2])
def test_alone(cls_layer, tmp_path):
    """In a process that knows nothing of ser_mm, from a folder whose name has a space."""
    cfg = config(dict(cls_layer=cls_layer))
    path, ours = checkpoint(cfg, tmp_path)
    usage = export_backbone(cfg, path, tmp_path / 'my timm')
    x = images(32, 32)
    with torch.no_grad():
        torch.save(dict(images=x, features=ours(x)[-1]), tmp_path / 'features.pth')
    (tmp_path / 'alone.py').write_text(ALONE.format(usage=usage))
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    command = [sys.executable, '-W', 'error::UserWarning', 'alone.py', 'features.pth']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
