"""Backbones as networks of timm and torchvision, and back: the same features."""

import pytest
import timm
import torch
import torchvision
from mmpretrain.registry import MODELS
from torch import nn

from ser_mm.checkpoint import load_backbone, read_weights
from ser_mm.evaluation import build_backbone
from ser_mm.evaluation.export import export_backbone
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
from tests.support.rounding import assert_far_above_rounding

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
