"""Backbones in the hands of timm, torchvision and plain MMPretrain."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from mmengine.config import Config
from mmpretrain.models import ResNet, VisionTransformer
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn

from ser_mm.checkpoint import load_backbone, read_weights
from ser_mm.evaluation import Embedder, build_backbone
from ser_mm.evaluation.export import data_config, export_backbone, to_timm
from tests.support.algorithms import BACKBONE, PIXELS
from tests.support.rounding import assert_far_above_rounding

timm = pytest.importorskip('timm')

VIT = {**BACKBONE, 'ser_layer': None}
# What both libraries compute of a few blocks, in float64, is the same sums in another order.
CLOSE = dict(rtol=1e-10, atol=1e-10)

KINDS = {
    'as usual': dict(),
    'late [CLS]': dict(cls_layer=2),
    'SER': dict(ser_layer=3),
    'mean of the patches': dict(out_type='avg_featmap', final_norm=False),
    'both norms': dict(out_type='avg_featmap'),
    'both norms and a late [CLS]': dict(out_type='avg_featmap', cls_layer=1),
    'map': dict(out_type='featmap'),
    'all tokens': dict(out_type='raw', cls_layer=1),
    'no [CLS]': dict(out_type='featmap', with_cls_token=False),
    'layer scale, pre-norm, no bias': dict(
        layer_scale_init_value=0.1, pre_norm=True, qkv_bias=False
    ),
    'no final norm': dict(final_norm=False),
    'oblong': dict(img_size=(32, 48)),
    'odd sizes': dict(arch=dict(BACKBONE['arch'], embed_dims=384, num_heads=6, num_layers=1)),
    'hidden channels that are no multiple': dict(
        arch=dict(BACKBONE['arch'], feedforward_channels=101)
    ),
}
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=40, edge='short', backend='pillow', interpolation='bilinear'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs'),
]


def config(backbone, **pixels):
    backbone = {**VIT, **backbone} if 'depth' not in backbone else backbone
    preprocessor = dict(type='SelfSupDataPreprocessor', **{**PIXELS, **pixels})
    dataset = dict(type='CustomDataset', data_root='x', pipeline=PIPELINE)
    model = dict(type='SimSiam', backbone=backbone, data_preprocessor=preprocessor)
    return Config(dict(model=model, evaluation=dict(val=dataset)))


def checkpoint(cfg, folder):
    """Of a network without a weight that is 0 or 1, and the network, in float64."""
    torch.manual_seed(0)
    network = build_backbone(cfg)
    for x in [*network.parameters(), *network.buffers()]:
        if x.is_floating_point():
            x.data = x.data + 0.2 * torch.rand_like(x)
    torch.save(
        dict(state_dict={f'backbone.{k}': v for k, v in network.state_dict().items()}),
        folder / 'run.pth',
    )
    return str(folder / 'run.pth'), network.double()


def images(*size, channels=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size, generator=rng, dtype=torch.float64)


def load(folder, **options):
    """As the user does; the module beside the weights is registered in this process already."""
    name = f'local-dir:{folder}'
    return timm.create_model(name, pretrained=True, num_classes=0, **options).double().eval()


def feature(network, x):
    out = network(x)[-1]
    return out.mean(dim=(2, 3)) if out.ndim == 4 else out


def test_tolerance_is_far_above_rounding():
    torch.manual_seed(0)
    network = build_backbone(config(dict(cls_layer=2)))
    results = [feature(network.to(t), images(32, 32).to(t)) for t in (torch.float64, torch.float32)]
    assert_far_above_rounding(*([x] for x in results), **CLOSE)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_vit_to_timm_and_back(kind, tmp_path):
    cfg = config(KINDS[kind])
    path, ours = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    theirs = load(tmp_path / 'timm')
    x = images(*ours.img_size)
    expected = feature(ours, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(x), expected, **CLOSE)
    own = (tmp_path / 'timm' / 'ser_vit.py').exists()
    assert own == (ours.cls_layer > 0 or 'both norms' in kind)
    assert (type(theirs) is timm.models.VisionTransformer) != own

    again = build_backbone(cfg)
    load_backbone(again, str(tmp_path / 'timm' / 'model.safetensors'))
    state = ours.float().state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize('cls_layer', [0, 2])
@pytest.mark.parametrize('how', ['dynamic_img_size', 'img_size'])
@torch.no_grad()
def test_other_sizes_are_those_of_pos_resize_timm(how, cls_layer, tmp_path):
    """Positions are resized in float32, by the same operations."""
    cfg = config(dict(cls_layer=cls_layer, pos_resize='timm'))
    path, ours = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    for size in ((24, 40), (16, 16), (32, 32)):
        theirs = load(tmp_path / 'timm', **{how: True if how == 'dynamic_img_size' else size})
        x = images(*size)
        expected = ours(x)[-1]
        torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)
        ours.pos_resize = 'mmpretrain'
        differs = (ours(x)[-1] - expected).abs().max() > 1e-3
        assert differs == (size != (32, 32))
        ours.pos_resize = 'timm'


@pytest.mark.parametrize('cls_layer', [0, 2])
def test_positions_are_smoothed_on_load_too(cls_layer):
    """That of timm at another size is what a network of that size has loaded."""
    torch.manual_seed(0)
    options = dict(VIT, cls_layer=cls_layer, pos_resize='timm')
    saved, loaded = MODELS.build(options), MODELS.build(dict(options, img_size=16))
    nn.init.normal_(saved.pos_embed)
    loaded.load_state_dict(saved.state_dict())
    extra = int(cls_layer == 0)
    expected = timm.layers.resample_abs_pos_embed(
        saved.pos_embed, [2, 2], [4, 4], num_prefix_tokens=extra
    )
    torch.testing.assert_close(loaded.pos_embed, expected)


@pytest.mark.parametrize('kind', ['as usual', 'late [CLS]', 'both norms', 'no [CLS]'])
@torch.no_grad()
def test_intermediates_of_timm(kind, tmp_path):
    cfg = config(KINDS[kind])
    path, ours = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    theirs = load(tmp_path / 'timm')
    x = images(32, 32)
    ours.out_type, ours.out_indices = 'raw', [0, 1, 2, 3]
    blocks = list(ours(x))
    final, maps = theirs.forward_intermediates(x, return_prefix_tokens=True)
    torch.testing.assert_close(final, blocks[-1], **CLOSE)
    ours.final_norm = False
    blocks[-1] = ours(x)[-1]
    for i, (block, found) in enumerate(zip(blocks, maps, strict=True)):
        patches, prefix = found if theirs.num_prefix_tokens else (found, block[:, :0])
        torch.testing.assert_close(patches.flatten(2).mT, block[:, -16:], **CLOSE)
        torch.testing.assert_close(prefix, block[:, :-16], **CLOSE, msg=f'block {i}')
    (only,) = theirs.forward_intermediates(
        x, [1], norm=True, stop_early=True, output_fmt='NLC', intermediates_only=True
    )
    torch.testing.assert_close(only, theirs.norm(blocks[1])[:, -16:], **CLOSE)
    pyramid = load(tmp_path / 'timm', features_only=True, out_indices=(1, 3))
    assert [tuple(y.shape) for y in pyramid(x)] == [(2, 48, 4, 4)] * 2


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
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    network, file = network.float(), str(tmp_path / 'network.onnx')
    torch.onnx.export(network, (x.float(),), file, dynamic_shapes=({0: batch},), dynamo=True)
    session = runtime.InferenceSession(file)
    (feeds,) = session.get_inputs()
    found = session.run(None, {feeds.name: others.float().numpy()})[0]
    expected = network(others.float())
    expected = expected if name == 'timm' else expected[-1]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


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


def test_data_config_of_other_configs():
    cfg = Config.fromfile('configs/mocov3_r50.py')
    data = data_config(cfg, MODELS.build(dict(type='SERResNet', depth=18)))
    assert data['crop_pct'] == 0.875 and data['input_size'] == [3, 224, 224]
    cfg.evaluation.val.pipeline[1].scale = 235
    pct = data_config(cfg, MODELS.build(dict(type='SERResNet', depth=18)))['crop_pct']
    assert int(224 / pct) == 235
    cfg = config(dict(), mean=None, std=None)
    data = data_config(cfg, MODELS.build(VIT))
    assert data['mean'] == [0, 0, 0] and data['std'] == pytest.approx([1 / 255] * 3)


@torch.no_grad()
def test_resnet_to_timm_and_torchvision_and_back(tmp_path):
    cfg = config(dict(type='SERResNet', depth=18, ser_layer=3))
    path, ours = checkpoint(cfg, tmp_path)
    ours.ser_layer = None
    export_backbone(cfg, path, tmp_path / 'timm')
    usage = export_backbone(cfg, path, tmp_path / 'resnet.pth', 'torchvision')
    names = dict(torch=torch, torchvision=torchvision)
    exec(usage, names)
    x = images(32, 32)
    expected = feature(ours, x)
    for theirs in (load(tmp_path / 'timm'), names['network'].double().eval()):
        torch.testing.assert_close(theirs(x), expected, rtol=1e-8, atol=1e-8)
    again = build_backbone(cfg, str(tmp_path / 'resnet.pth'))
    state = ours.float().state_dict()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())


SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2)
TIMM = {
    'as usual': dict(),
    'late [CLS]': dict(cls_layer=1),
    'registers': dict(model_args=dict(SMALL, reg_tokens=2)),
    'late [CLS] and registers': dict(cls_layer=2, model_args=dict(SMALL, reg_tokens=2)),
    'mean': dict(out_type='avg_featmap'),
    'late mean with norms': dict(
        cls_layer=1, model_args=dict(SMALL, global_pool='avg', qk_norm=True, init_values=0.1)
    ),
    'all tokens': dict(out_type='raw', cls_layer=1),
    'ResNet': dict(type='SERTimmStages', model='resnet10t', model_args=dict(channels=(8,) * 4)),
    'ConvNeXt': dict(
        type='SERTimmStages', model='convnext_atto', model_args=dict(dims=[8] * 4, depths=[1] * 4)
    ),
}


@pytest.mark.parametrize('kind', TIMM)
@torch.no_grad()
def test_from_timm_to_timm(kind, tmp_path):
    """Weights of timm in our backbone, and back."""
    options = dict(type='SERTimmViT', model='vit_tiny_patch16_224', model_args=SMALL)
    cfg = config({**TIMM[kind], 'depth': 0})
    cfg.model.backbone = {**options, **TIMM[kind]}
    path, ours = checkpoint(cfg, tmp_path)
    export_backbone(cfg, path, tmp_path / 'timm')
    theirs = load(tmp_path / 'timm')
    x = images(32, 64 if 'type' in TIMM[kind] else 32)
    torch.testing.assert_close(theirs(x), ours(x)[-1].squeeze(), **CLOSE)
    assert (tmp_path / 'timm' / 'ser_vit.py').exists() == ('cls_layer' in TIMM[kind])
    again = build_backbone(cfg, str(tmp_path / 'timm' / 'model.safetensors')).double()
    torch.testing.assert_close(again(x)[-1], ours(x)[-1], **CLOSE)


@pytest.mark.slow  # by its size
@torch.no_grad()
def test_resnet50_of_torchvision_there_and_back(tmp_path):
    theirs = torchvision.models.resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    cfg = config(dict(type='SERResNet', depth=50))
    path = str(tmp_path / 'theirs.pth')
    export_backbone(cfg, path, tmp_path / 'back.safetensors', 'torchvision')
    weights = read_weights(str(tmp_path / 'back.safetensors'))
    state = theirs.state_dict()
    assert weights.keys() == {name for name in state if not name.startswith('fc.')}
    assert all(torch.equal(x, state[name]) for name, x in weights.items())
    theirs.fc = nn.Identity()
    x = images(32, 32)
    found = feature(build_backbone(cfg, path).double(), x)
    torch.testing.assert_close(found, theirs.double()(x), rtol=1e-8, atol=1e-8)


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
