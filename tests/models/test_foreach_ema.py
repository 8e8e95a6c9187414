"""The momentum update by foreach operations, beside MMPretrain's own."""

import copy

import pytest
import torch
from mmengine.logging import MessageHub
from mmpretrain.models import CosineEMA
from mmpretrain.registry import MODELS
from torch import nn

from ser_mm.models import ForeachCosineEMA
from ser_mm.models.foreach_ema import use_foreach_update
from tests.support.algorithms import ALGORITHMS, build, two_views


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)]
    layers[0].weight.requires_grad_(False)  # frozen parameters are averaged too
    return nn.Sequential(*layers).to(dtype)


def train(model):
    """Parameters and running statistics move on."""
    model(torch.randn(6, 3, 4, 4, dtype=model[3].weight.dtype))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)


def assert_equal(ours, theirs):
    """On the CPU both multiply and add tensor by tensor, by the same operations."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


OPTIONS = {
    'default': {},
    'schedule': dict(momentum=0.4, end_momentum=0.1),
    'every third step': dict(momentum=0.3, interval=3),
    'buffers': dict(momentum=0.3, update_buffers=True),
}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('name', OPTIONS)
def test_equals_that_of_mmpretrain_bit_for_bit(name, dtype):
    MessageHub.get_current_instance().update_info('max_iters', 20)
    model = network(dtype)
    averages = [kind(model, **OPTIONS[name]) for kind in (ForeachCosineEMA, CosineEMA)]
    before = copy.deepcopy(averages[0].state_dict())
    for _ in range(8):
        train(model)
        for average in averages:
            average.update_parameters(model)
        assert_equal(*averages)
    last = averages[0].state_dict()
    assert not any(torch.equal(last[k], before[k]) for k in last)
    assert last['steps'] == 8
    assert not torch.equal(last['module.3.weight'], model[3].weight)


@pytest.mark.parametrize('kinds', [(CosineEMA, ForeachCosineEMA), (ForeachCosineEMA, CosineEMA)])
def test_checkpoints_load_into_either_and_go_on(kinds):
    MessageHub.get_current_instance().update_info('max_iters', 20)
    model = network()
    saved, loaded = (kind(model, momentum=0.3) for kind in kinds)
    for _ in range(3):
        train(model)
        saved.update_parameters(model)
    loaded.load_state_dict(saved.state_dict(), strict=True)
    twin = copy.deepcopy(loaded)
    for _ in range(3):
        train(model)
        for average in (saved, loaded, twin):
            average.update_parameters(model)
        assert_equal(loaded, saved)
        assert_equal(twin, saved)


@pytest.mark.parametrize('name', ['mocov3', 'byol', 'dino'])
def test_the_average_of_a_wrapped_algorithm_is_updated_so(name):
    config = copy.deepcopy(ALGORITHMS[name])
    model = build(config)
    averages = [m for m in model.modules() if isinstance(m, CosineEMA)]
    assert [type(average) for average in averages] == [ForeachCosineEMA]
    for _ in range(2):
        model.loss(two_views())
    assert averages[0].steps == 2


def test_replaced_in_the_middle_of_training():
    algorithm = MODELS.build(ALGORITHMS['mocov3']['algorithm']).eval()
    MessageHub.get_current_instance().update_info('max_iters', 20)
    source = nn.Sequential(algorithm.backbone, algorithm.neck)
    algorithm.momentum_encoder.update_parameters(source)
    with torch.no_grad():
        for p in source.parameters():
            p += 1
    twin = copy.deepcopy(algorithm)
    use_foreach_update(twin)
    assert type(twin.momentum_encoder) is ForeachCosineEMA
    assert not twin.momentum_encoder.training
    for module in (algorithm, twin):
        module.momentum_encoder.update_parameters(source)
    assert_equal(twin, algorithm)
