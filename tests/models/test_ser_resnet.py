"""SERResNet: MMPretrain's ResNet, and the container in two passes."""

import copy

import pytest
import torch
from mmpretrain.models import ResNet
from mmpretrain.registry import MODELS

from ser_mm.views import ViewBatch
from tests.support.algorithms import RESNET
from tests.support.rounding import assert_far_above_rounding

SMALL = dict(RESNET, norm_cfg=dict(type='BN'))
# Of float64, see test_tolerance_is_far_above_rounding.
CLOSE = dict(rtol=1e-9, atol=1e-9)


def build(**options):
    torch.manual_seed(0)
    network = MODELS.build({**SMALL, **options})
    network.init_weights()
    return network


def view(n1=3, n2=2, size=(64, 96), dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return ViewBatch(
        torch.randn(n1, 3, 64, 64, generator=rng, dtype=dtype),
        torch.randn(n2, 3, *size, generator=rng, dtype=dtype),
        torch.zeros(n2, dtype=torch.int64),
    )


@pytest.mark.parametrize('options', [{}, dict(deep_stem=True), dict(depth=50, base_channels=4)])
def test_tolerance_is_far_above_rounding(options):
    results = []
    for dtype in (torch.float64, torch.float32):
        network = build(out_indices=(0, 1, 2, 3), **options).to(dtype)
        results.append(network(view(dtype=torch.float64).equi.to(dtype)))
    assert_far_above_rounding(*results, **CLOSE)


def test_images_run_as_in_resnet():
    network = build(out_indices=(1, 3))
    options = {key: value for key, value in SMALL.items() if key not in ('type', 'ser_layer')}
    plain = ResNet(**options, out_indices=(1, 3))
    plain.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 48)
    for out, expected in zip(network(x), plain(x), strict=True):
        assert torch.equal(out, expected)  # by the same operations in the same shapes


@pytest.mark.parametrize('ser_layer', [1, 2, 3, 4])
@pytest.mark.parametrize('options', [{}, dict(deep_stem=True), dict(depth=50, base_channels=4)])
def test_map_of_every_stage_has_the_channels_and_stride_told(ser_layer, options):
    network = build(ser_layer=ser_layer, **options).double()
    x = view(dtype=torch.float64)
    network(x)
    stride = network.token_map_stride
    assert stride == 4 * 2 ** (ser_layer - 1)
    token_map = x.token_maps[network]
    assert token_map.shape == (2, network.token_map_channels, 64 // stride, 96 // stride)
    stages = build(ser_layer=ser_layer, out_indices=(0, 1, 2, 3), **options).double()
    torch.testing.assert_close(token_map, stages(x.equi)[ser_layer - 1], **CLOSE)


def test_embeddings_are_those_of_two_passes():
    network = build(out_indices=(1, 3)).double()
    x = view(dtype=torch.float64)
    outs = network(x)
    for out, base, equi in zip(outs, network(x.base), network(x.equi), strict=True):
        expected = torch.cat([base.mean(dim=(2, 3)), equi.mean(dim=(2, 3))])
        torch.testing.assert_close(out, expected[..., None, None], **CLOSE)


@pytest.mark.parametrize('n1, n2', [(3, 0), (0, 2)])
def test_either_part_may_be_empty(n1, n2):
    network = build()
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    x = view(n1, n2)
    (out,) = network(x)
    assert len(out) == 3 - n2 // 2 == n1 + n2
    assert x.token_maps[network].shape == (n2, 48, 8, 12)
    (out.square().sum() + x.token_maps[network].sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert all(torch.isfinite(b).all() for b in network.buffers())
    if n1 == 0:
        assert all(torch.equal(b, buffers[name]) for name, b in network.named_buffers())


def test_running_statistics_are_those_of_b1():
    network = build()
    alone = copy.deepcopy(network)
    x = view()
    network(x)
    alone(x.base)
    for mine, expected in zip(network.buffers(), alone.buffers(), strict=True):
        assert torch.equal(mine, expected)  # by the same operations in the same shapes
    network(x.equi)  # and images are as ever
    assert not torch.equal(network.bn1.running_mean, alone.bn1.running_mean)


def test_frozen_stages_and_eval_mode_keep_their_statistics():
    network = build(frozen_stages=4).double()
    before = {name: b.clone() for name, b in network.named_buffers()}
    x = view(dtype=torch.float64)
    (out,) = network(x)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    network.eval()
    expected = network(x.base)[0].mean((2, 3), keepdim=True)
    torch.testing.assert_close(out[:3], expected, **CLOSE)


def test_a_rank_without_b2_still_runs_its_pass():
    """Other ranks wait for it in every synchronised BatchNorm."""
    network, calls = build(), []
    network.layer4.register_forward_hook(lambda *_: calls.append(1))
    network(view(n2=0))
    assert len(calls) == 2


@pytest.mark.parametrize('n1', [3, 0])
def test_b2_is_computed_in_float32_in_mixed_precision(n1):
    """And b1 where a rank has none, as ranks with and without images exchange statistics."""
    network, seen = build(), []
    for norm in (network.bn1, network.layer4[1].bn2):
        norm.register_forward_hook(lambda module, args, _: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        (out,) = network(view(n1=n1))
    base = torch.bfloat16 if n1 else torch.float32
    assert seen == [base, base, torch.float32, torch.float32]
    out.sum().backward()


def test_refuses_checkpointing_of_blocks_that_run_twice():
    with pytest.raises(ValueError, match='with_cp=True cannot be used with ser_layer'):
        build(with_cp=True)
    build(with_cp=True, ser_layer=None)


@pytest.mark.parametrize('ser_layer', [0, 5])
def test_refuses_a_stage_outside_the_network(ser_layer):
    with pytest.raises(ValueError, match=f'ser_layer={ser_layer} .* 1 to 4'):
        build(ser_layer=ser_layer)


def test_pretrained_is_strict(tmp_path):
    trained, path = build(), tmp_path / 'weights.pth'
    state = {f'backbone.{k}': torch.rand_like(v.float()) for k, v in trained.state_dict().items()}
    torch.save(dict(state_dict=state), path)
    init = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    loaded = build(init_cfg=init)
    assert torch.equal(loaded.layer4[1].conv2.weight, state['backbone.layer4.1.conv2.weight'])
    state.pop('backbone.layer1.0.bn1.weight')
    torch.save(dict(state_dict=state), path)
    with pytest.raises(ValueError, match='layer1.0.bn1.weight'):
        build(init_cfg=init)


@pytest.mark.parametrize('ser_layer', [None, 2])
def test_features_are_the_mean_of_a_stage_and_leave_running_statistics_alone(ser_layer):
    network = build(ser_layer=ser_layer)
    network.train()
    before = copy.deepcopy(dict(network.named_buffers()))
    x = view().base
    features = network.features(x)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert all(m.track_running_stats for m in network.modules() if hasattr(m, 'running_mean'))
    plain = build(out_indices=(0, 1, 2, 3))
    plain.train()
    maps = plain(x)
    torch.testing.assert_close(features, maps[(ser_layer or 4) - 1].mean(dim=(2, 3)))


def test_features_are_computed_in_mixed_precision():
    """Whole batches of extra views are; in float32 they would be most of the memory of a step."""
    network, seen = build(), []
    network.train()
    norm = network.layer2[1].bn2
    norm.register_forward_hook(lambda module, args, _: seen.append(args[0].dtype))
    momentum, count = norm.momentum, norm.num_batches_tracked
    before = copy.deepcopy(dict(network.named_buffers()))
    with torch.autocast('cpu', torch.bfloat16):
        network.features(view().base).sum().backward()
    assert seen == [torch.bfloat16]
    assert norm.momentum == momentum and norm.num_batches_tracked is count
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
