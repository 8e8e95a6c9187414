"""Objectives of EquivarianceAlgorithm do not depend on how a batch is spread over ranks.

Two gloo processes hold half of a batch each; what they compute, averaged as DDP does, is compared
with one process that holds all. Norms are per image, so that BatchNorm has no part in it.
"""

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

from ser_mm.draws import NUM_DRAWS
from ser_mm.views import ViewBatch
from tests.support import reference
from tests.support.algorithms import IMAGE, build
from tests.support.heads import HEADS, SMALL, VIEWS, config
from tests.support.two_ranks import on_two_ranks

pytestmark = pytest.mark.slow

# Of float64; rounding of such networks is a ten-thousandth of 1e-8 and 1e-10 in test_ser_algorithm.
CLOSE = dict(rtol=1e-9, atol=1e-12)
N = 8
CASES = [(name, form) for name in HEADS for form in ('original', 'decoupled')]
CASES += [(name, 'moco') for name in ('equimod', 'stl')]


def model_of(name, form):
    torch.manual_seed(0)
    loss = {}
    if form == 'moco':
        form, loss = 'original', dict(loss='moco')
    cfg = config(name, 'simsiam', form, norm=dict(type='LN'))
    cfg['head'].update(loss)
    for part in (cfg['algorithm']['neck'], cfg['algorithm']['head']['predictor']):
        part.update(norm_cfg=dict(type='LN'), with_last_bn=False, with_last_bias=True)
        part.pop('with_last_bn_affine')
    return build(cfg).double().train()


def share(name, rank=None):
    """The views of all images, or of those of a rank; pairs stay together."""
    rng = torch.Generator().manual_seed(3)
    part = slice(None) if rank is None else slice(rank * N // 2, (rank + 1) * N // 2)

    def images(side):
        return torch.randn(N, 3, side, side, generator=rng, dtype=torch.float64)[part]

    none = torch.zeros(0, 3, IMAGE, IMAGE, dtype=torch.float64)
    views = [ViewBatch(images(IMAGE), none, torch.zeros(0, dtype=torch.int64)) for _ in range(2)]
    for view in views:
        draws = torch.rand(N, NUM_DRAWS, generator=rng, dtype=torch.float64)[part]
        view.draws = draws if VIEWS[name].get('record_draws') else None
    sides = [SMALL if name == 'essl' else IMAGE] * len(VIEWS[name].get('extra_views', []))
    return [*views, *map(images, sides)]


def step(model, inputs):
    """The losses, and the gradients of the objective."""
    losses = model.loss(inputs)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        losses['loss_equi'], params, allow_unused=True, materialize_grads=True
    )
    return [losses['loss_equi'].detach(), losses['loss_inv'].detach(), *grads]


def whole_step(model, inputs):
    """The gradients of a training step."""
    module = getattr(model, 'module', model)
    total, _ = module.parse_losses(model(inputs, None, mode='loss'))
    total.backward()
    return [p.grad for p in module.parameters() if p.requires_grad]


def on_rank(rank):
    """All of this module, as starting processes takes longest."""
    reference.float64_positions(pytest.MonkeyPatch())
    results = {}
    for name, form in CASES:
        averaged = [x.contiguous() for x in step(model_of(name, form), share(name, rank))]
        for value in averaged:
            dist.all_reduce(value)
            value /= 2
        ddp = MMDistributedDataParallel(model_of(name, form), find_unused_parameters=False)
        results[name, form] = averaged, whole_step(ddp, share(name, rank))
    return results


@pytest.fixture(scope='module')
def ranks():
    return on_two_ranks(on_rank)


@pytest.fixture(autouse=True)
def float64_here(monkeypatch):
    reference.float64_positions(monkeypatch)


@pytest.mark.parametrize('name, form', CASES)
def test_two_ranks_equal_one(ranks, name, form):
    """Both losses, the gradients of the objective, and those of a whole step under DDP."""
    expected = (
        step(model_of(name, form), share(name)),
        whole_step(model_of(name, form), share(name)),
    )
    for result in ranks:
        for values, others in zip(result[name, form], expected, strict=True):
            for value, other in zip(values, others, strict=True):
                torch.testing.assert_close(value, other, **CLOSE)
    assert any(grad.any() for grad in expected[0][2:])
