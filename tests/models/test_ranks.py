"""Losses and gradients do not depend on how a batch is spread over ranks.

Two gloo processes hold parts of a batch, b2 spread unevenly; what they compute, averaged as DDP
does, is compared with one process that holds all. Norms are per image or token, so that BatchNorm
has no part in it. Ranks hold four images each: the averages of the base losses over a rank, and
over all, are then those of the union.
"""

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

from ser_mm.models import SERHead
from ser_mm.views import ViewBatch
from tests.support import reference
from tests.support.algorithms import ALGORITHMS, BASES, build, mlp, two_views
from tests.support.two_ranks import on_two_ranks

pytestmark = pytest.mark.slow

# Number of b2 images on each rank.
SPLITS = [(3, 1), (2, 0), (0, 4), (2, 2), (0, 0)]
# Every split with keys from a momentum branch and with keys from the online one.
CASES = [
    (name, split)
    for name in ALGORITHMS
    for split in (SPLITS if name in ('mocov3', 'simsiam') else SPLITS[:2])
]
# Of float64; rounding of such networks is a ten-thousandth of 1e-8 and 1e-10 in test_ser_algorithm.
CLOSE = dict(rtol=1e-9, atol=1e-12)


def without_batch_norm(**options):
    return mlp(norm_cfg=dict(type='LN'), with_last_bn=False, with_last_bias=True, **options)


def model_of(name, **options):
    """Keys from a momentum branch (MoCo v3), and with gradient from the online one (SimSiam)."""
    backbone = ALGORITHMS[name]['algorithm']['backbone']
    pooled = backbone['type'] == 'SERResNet'
    neck = without_batch_norm(in_channels=192 if pooled else 48, with_avg_pool=pooled)
    algorithm = BASES[name.removesuffix('_resnet')](backbone, neck)
    if 'predictor' in algorithm['head']:
        algorithm['head']['predictor'] = without_batch_norm()
    torch.manual_seed(0)
    model = build({**ALGORITHMS[name], 'algorithm': algorithm, **options}).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):  # that of Barlow Twins' head
            module.eval()
    model.loss(union(SPLITS[0]))  # the momentum branch begins, and then falls behind
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p) if p.requires_grad else 0
    return model


def union(split):
    return two_views(8 - sum(split), sum(split), ((2, 3), (3, 2)), seed=7, dtype=torch.float64)


def share(views, split, rank):
    """This rank's part of the views: four images, ``split[rank]`` of b2."""
    n1, n2 = [4 - n for n in split], split
    return [
        ViewBatch(
            view.base.split(n1)[rank], view.equi.split(n2)[rank], view.elements.split(n2)[rank]
        )
        for view in views
    ]


def ser_step(model, views):
    """The losses, and the gradients of the equivariance loss alone."""
    losses = model.loss(views)
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        losses['loss_ser'], params, allow_unused=True, materialize_grads=True
    )
    return [losses['loss_ser'].detach(), losses['loss_inv'].detach(), *grads]


def whole_step(model, views):
    """The gradients of a training step."""
    module = getattr(model, 'module', model)
    for _ in range(2):  # only in the second one does DDP miss a parameter that had no gradient
        model.zero_grad()
        total, _ = module.parse_losses(model(views(), None, mode='loss'))
        total.backward()
    return [p.grad for p in module.parameters() if p.requires_grad]


def step(name, split, rank):
    """What one rank computes, averaged by hand and by DDP."""
    averaged = ser_step(model_of(name), share(union(split), split, rank))
    averaged = [value.contiguous() for value in averaged]
    for value in averaged:
        dist.all_reduce(value)
        value /= 2
    ddp = MMDistributedDataParallel(model_of(name), find_unused_parameters=False)
    return averaged, whole_step(ddp, lambda: share(union(split), split, rank))


# Ragged maps: for each rank the number of images, and the grid of each direction.
RAGGED = [
    [(2, [(2, 3), (3, 1)]), (1, [(1, 2), (2, 2)])],
    [(0, [(2, 3), (3, 1)]), (3, [(1, 2), (2, 2)])],
    [(1, [(2, 2), (1, 1)]), (0, [(3, 3), (2, 1)])],
    [(0, [(2, 2), (1, 1)]), (0, [(3, 3), (2, 1)])],
]


def maps(case, seed):
    """Per rank and direction, (N, C, h, w)."""
    rng = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, 5, *grid, generator=rng, dtype=torch.float64) for grid in grids]
        for n, grids in case
    ]


def ragged_step(case, block_size, negatives, rank):
    seeds = range(3 if negatives == 'both' else 2)
    sides = [[x.requires_grad_() for x in maps(case, seed)[rank]] for seed in seeds]
    loss = SERHead(0.3, block_size, negatives).loss(*sides)
    inputs = [x for side in sides for x in side]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads


def on_rank(rank):
    """All of this module, as starting processes takes longest."""
    reference.float64_positions(pytest.MonkeyPatch())
    steps = {(name, split): step(name, split, rank) for name, split in CASES}
    ragged = {
        (i, size, negatives): ragged_step(case, size, negatives, rank)
        for i, case in enumerate(RAGGED)
        for size in (1024, 2)
        for negatives in ('other', 'both')
    }
    return steps, ragged


@pytest.fixture(scope='module')
def ranks():
    return on_two_ranks(on_rank)


@pytest.fixture(autouse=True)
def float64_here(monkeypatch):
    reference.float64_positions(monkeypatch)


def assert_same(values, expected):
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize('name, split', CASES)
def test_two_ranks_equal_one(ranks, name, split):
    """Both losses, the gradients of loss_ser, and those of a whole step as DDP averages them."""
    (averaged, grads), (averaged_1, grads_1) = (steps[name, split] for steps, _ in ranks)
    assert_same(averaged, averaged_1)
    assert_same(grads, grads_1)
    assert_same(averaged, ser_step(model_of(name), union(split)))
    assert_same(grads, whole_step(model_of(name), lambda: union(split)))
    assert any(grad.any() for grad in averaged[2:]) == (sum(split) > 0)


@pytest.mark.parametrize('negatives', ['other', 'both'])
@pytest.mark.parametrize('block_size', [1024, 2])
@pytest.mark.parametrize('case', range(len(RAGGED)))
def test_ragged_maps_on_two_ranks_equal_the_formula(ranks, case, block_size, negatives):
    """Grids may differ between ranks, which draw them for themselves."""
    sides = [maps(RAGGED[case], seed) for seed in range(3 if negatives == 'both' else 2)]
    leaves = [x.requires_grad_() for side in sides for rank in side for x in rank]
    expected = torch.zeros((), dtype=torch.float64) + 0 * sum(x.sum() for x in leaves)
    if sum(len(rank[0]) for rank in sides[0]):
        for direction in range(2):
            queries, keys, *same = [[x for rank in side for x in rank[direction]] for side in sides]
            expected = expected + reference.info_nce(queries, keys, 0.3, *same) / 2
    results = [ragged[case, block_size, negatives] for _, ragged in ranks]
    assert_same([sum(loss for loss, _ in results) / 2], [expected.detach()])
    by_rank = [[x for maps_of in rank for x in maps_of] for rank in zip(*sides, strict=True)]
    for (_, grads), inputs in zip(results, by_rank, strict=True):
        assert_same(
            [grad / 2 for grad in grads], torch.autograd.grad(expected, inputs, retain_graph=True)
        )
