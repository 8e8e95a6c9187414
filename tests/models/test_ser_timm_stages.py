"""SERTimmStages: timm's ResNets and ConvNeXts as backbones for SER."""

import copy

import pytest
import torch
from mmpretrain.registry import MODELS

from ser_mm.evaluation import token_maps_of
from ser_mm.views import ViewBatch
from tests.support.algorithms import build, mlp, simsiam, with_ser
from tests.support.rounding import assert_far_above_rounding

timm = pytest.importorskip('timm')

KINDS = {
    'resnet18': dict(channels=(16, 24, 32, 40)),
    'resnet26': dict(channels=(16, 32, 48, 64), base_width=16),
    'resnet26d': dict(channels=(16, 32, 48, 64)),
    'convnext_atto': dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1)),
    'convnextv2_atto': dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1)),
}
# Of float64, see test_tolerance_is_far_above_rounding.
CLOSE = dict(rtol=1e-9, atol=1e-9)


def config(model, **options):
    return dict(type='SERTimmStages', model=model, model_args=KINDS[model], **options)


def built(model, **options):
    torch.manual_seed(0)
    network = MODELS.build(config(model, **options))
    for p in network.parameters():
        p.data = p.data + 0.05 * torch.randn_like(p)
    return network.double()


def view(n1=3, n2=2):
    rng = torch.Generator().manual_seed(0)
    base, equi = (
        torch.randn(n, 3, *size, generator=rng, dtype=torch.float64)
        for n, size in ((n1, (64, 64)), (n2, (64, 96)))
    )
    return ViewBatch(base, equi, torch.zeros(n2, dtype=torch.int64))


def test_tolerance_is_far_above_rounding():
    results = []
    for dtype in (torch.float64, torch.float32):
        network = built('convnext_atto').to(dtype)
        results.append(network(view().equi.to(dtype)))
    assert_far_above_rounding(*results, **CLOSE)


@pytest.mark.parametrize('model', KINDS)
def test_equals_timm(model):
    ours = built(model)
    theirs = timm.create_model(model, num_classes=0, **KINDS[model]).double()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = view().equi
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        torch.testing.assert_close(ours(x)[-1].flatten(1), theirs(x), **CLOSE)
        for name, value in ours.named_buffers():  # the running statistics
            torch.testing.assert_close(value, theirs.get_buffer(name), **CLOSE)
    maps = built(model, out_type='featmap', out_indices=(0, 1, 2, 3))
    maps.load_state_dict(ours.state_dict())
    expected = theirs.forward_intermediates(x, intermediates_only=True)[-4:]
    for found, there in zip(maps.train(False)(x), expected, strict=True):
        torch.testing.assert_close(found, there, **CLOSE)


@pytest.mark.parametrize('ser_layer', [1, 3])
@pytest.mark.parametrize('model', ['resnet18', 'convnext_atto'])
def test_views(model, ser_layer):
    network = built(model, ser_layer=ser_layer).eval()
    x = view()
    x.wants_features = True
    (out,) = network(x)
    separate = torch.cat([network(part)[0] for part in (x.base, x.equi)])
    torch.testing.assert_close(out, separate, **CLOSE)
    maps = built(model, out_type='featmap', out_indices=(ser_layer - 1,)).eval()
    (expected,) = maps(x.equi)
    token_map = x.token_maps[network]
    torch.testing.assert_close(token_map, expected, **CLOSE)
    stride = network.token_map_stride
    assert token_map.shape == (2, network.token_map_channels, 64 // stride, 96 // stride)
    features = torch.cat([network.features(part) for part in (x.base, x.equi)])
    torch.testing.assert_close(x.features[network], features, **CLOSE)
    assert features.shape[1] == network.feature_channels
    with pytest.raises(ValueError, match="out_type='featmap' cannot hold b1 and b2"):
        maps(view())


def test_running_statistics_are_those_of_b1():
    network = built('resnet18', ser_layer=2).train()
    alone = copy.deepcopy(network)
    x = view()
    network(x), alone(x.base)
    for a, b in zip(network.buffers(), alone.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('model', ['resnet18', 'convnext_atto'])
def test_ser_trains_the_stages_below_its_token_map(model):
    backbone = MODELS.build(config(model, ser_layer=2))
    neck = mlp(backbone._infos[-1]['num_chs'], with_avg_pool=True)
    wrapped = with_ser(simsiam(config(model, ser_layer=2), neck))
    wrapped.pop('neck')
    wrapped['data_preprocessor'] = dict(wrapped['data_preprocessor'], patch_size=8)
    network = build(wrapped)
    views = [view(), view()]
    for x in views:
        x.base, x.equi = x.base.float(), x.equi.float()
    network.loss(views, [None] * 5)['loss_ser'].backward()
    grads = {n: p.grad for n, p in network.algorithm.backbone.named_parameters()}
    for i, stage in enumerate(backbone.res_layers):
        reached = any(g is not None and g.any() for n, g in grads.items() if n.startswith(stage))
        assert reached == (i < 2), stage


def test_weights_of_timm_from_a_file(tmp_path):
    for model in ('resnet18', 'convnext_atto'):
        theirs = timm.create_model(model, num_classes=5, **KINDS[model]).eval()
        torch.save(theirs.state_dict(), tmp_path / 'weights.pth')
        init = dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'))
        network = MODELS.build(config(model, init_cfg=init)).eval()
        network.init_weights()
        theirs.reset_classifier(0)
        x = view().base.float()
        torch.testing.assert_close(network(x)[-1].flatten(1), theirs(x), rtol=1e-5, atol=1e-5)


MLP = dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), head_hidden_size=16)  # small
REFUSED = {
    'unknown name': (dict(model='resnet19'), 'not in timm .*resnet18'),
    'a ViT': (dict(model='vit_tiny_patch16_224'), 'a VisionTransformer; only ResNet and ConvNeXt'),
    'ConvNeXt, norm first': (dict(model='convnext_tiny_hnf'), 'head_norm_first'),
    'ConvNeXt, MLP': (dict(model='convnext_large_mlp', model_args=MLP), 'head_hidden_size'),
    'RegNet': (dict(model='regnetx_002'), 'a RegNet; only'),
    'ser_layer': (dict(ser_layer=5), 'ser_layer=5 .*from 1 to 4'),
    'out_indices': (dict(out_indices=(4,), out_type='featmap'), r'out_indices=\(4,\)'),
    'pooled early': (dict(out_indices=(1,)), "needs out_type='featmap'"),
    'other pooling': (dict(model_args=dict(global_pool='max')), "pooled by 'max'"),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_is_refused_by_name(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as info:
        MODELS.build({**dict(type='SERTimmStages', model='resnet18'), **options})
    assert '\n' not in str(info.value)


@pytest.mark.parametrize(
    'options',
    [
        config('resnet18'),
        config('convnext_atto'),
        dict(
            type='SERTimmViT', model='vit_tiny_patch16_224', model_args=dict(img_size=64, depth=4)
        ),
    ],
)
def test_evaluations_see_the_map_of_every_stage_or_block(options):
    backbone = MODELS.build(options).eval()
    before = backbone.out_type, backbone.out_indices
    images = view().base.float()
    with token_maps_of(backbone) as maps_of:
        maps = maps_of(images)
    assert len(maps) == 4 and all(x.ndim == 4 for x in maps)
    assert (backbone.out_type, backbone.out_indices) == before
    assert len(backbone(images)) == 1
