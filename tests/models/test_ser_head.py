"""SERHead: the loss of the formula, in memory linear in the number of tokens."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ser_mm.models import SERHead
from tests.support import reference
from tests.support.rounding import rounding

# Grids and number of images, per case: ragged ones, one image, one token, none.
CASES = {
    'ragged': (3, [(2, 3), (4, 2)]),
    'one image': (1, [(2, 3), (3, 3)]),
    'one token': (2, [(1, 1), (1, 1)]),
    'no image': (0, [(2, 3), (4, 2)]),
    'one direction': (3, [(2, 2)]),
    'three directions': (2, [(2, 2), (1, 3), (3, 2)]),
}


# Chains of some 100 operations, rounded by 1e-16 each, on logits of at most 1 / 0.3.
CLOSE = dict(rtol=1e-12, atol=1e-12)


def leaves(n, grids, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 5, *grid, generator=rng, dtype=dtype, requires_grad=True) for grid in grids
    ]


def loop(queries, keys, temperature):
    if not len(queries[0]):
        return 0 * sum(q.sum() for q in queries)
    losses = [reference.info_nce(q, k, temperature) for q, k in zip(queries, keys, strict=True)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize('block_size', [1024, 4])  # at once; in blocks, the last one short
@pytest.mark.parametrize('case', CASES)
def test_equals_the_formula_in_value_and_gradient(case, block_size):
    queries, keys = leaves(*CASES[case]), leaves(*CASES[case], seed=1)
    head = SERHead(temperature=0.3, block_size=block_size)
    loss, expected = head.loss(queries, keys), loop(queries, keys, 0.3)
    torch.testing.assert_close(loss, expected, **CLOSE)
    if case in ('no image', 'one image'):
        assert expected == 0  # log(1)
    inputs = [*queries, *keys]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, **CLOSE)
        assert case in ('no image', 'one image') or grad.abs().max() > 1e-3


@pytest.mark.parametrize('block_size', [1024, 4])
def test_negatives_of_both_views(block_size):
    """The formula of the paper's summary: tokens of other images in either view."""
    grids = [(2, 3), (4, 2)]
    queries, keys, same = (leaves(3, grids, seed=seed) for seed in range(3))
    head = SERHead(temperature=0.3, block_size=block_size, negatives='both')
    loss = head.loss(queries, keys, same)
    expected = sum(
        reference.info_nce(q, k, 0.3, s) for q, k, s in zip(queries, keys, same, strict=True)
    ) / len(grids)
    torch.testing.assert_close(loss, expected, **CLOSE)
    inputs = [*queries, *keys, *same]
    pairs = zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    )
    for grad, other in pairs:
        torch.testing.assert_close(grad, other, **CLOSE)
        assert grad.any()
    assert not torch.equal(loss, SERHead(temperature=0.3).loss(queries, keys))
    with pytest.raises(ValueError, match="negatives='both' needs the keys of both views"):
        head.loss(queries, keys)


def test_same_maps_on_both_sides():
    """Keys of the online branch: gradient through queries and keys of one tensor."""
    x = leaves(3, [(2, 3), (2, 3)])
    swapped = [x[1], x[0]]
    grads = torch.autograd.grad(SERHead(0.5).loss(x, swapped), x)
    for grad, expected in zip(grads, torch.autograd.grad(loop(x, swapped, 0.5), x), strict=True):
        torch.testing.assert_close(grad, expected, **CLOSE)


def test_own_tokens_are_no_negatives():
    """Keys of an image may be alike: only those of other images count."""
    q = torch.eye(4, dtype=torch.float64).reshape(2, 2, 4).transpose(1, 2).unsqueeze(2)
    loss = SERHead(temperature=1.0).loss([q], [q])  # 2 images of 2 tokens, all orthogonal
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-1)), abs=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_computes_in_float32_at_least(dtype):
    case = CASES['ragged']
    queries, keys = ([x.detach().to(dtype) for x in leaves(*case, seed=s)] for s in (0, 1))
    with torch.autocast('cpu', torch.bfloat16):
        loss = SERHead(0.5).loss(queries, keys)
    assert loss.dtype == torch.float32
    expected = loop([q.double() for q in queries], [k.double() for k in keys], 0.5)
    # A logit, 1 / 0.5 at most, takes 15 operations one after the other: two norms of 5 channels,
    # divisions and a product. The loss is off by that of two, and by 30 operations on sums of 24.
    bound = rounding(2 * 15 + 30, 2, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=bound)
    assert bound < 1e-5  # bfloat16 would round by 4e-3


def test_large_logits_stay_finite():
    queries, keys = leaves(*CASES['ragged']), leaves(*CASES['ragged'], seed=1)
    loss = SERHead(temperature=1e-3).loss(queries, keys)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, queries))


def step_memory(images, tokens=32, block_size=64):
    """Bytes saved for the backward pass, and peak of a whole step, as the allocator counts."""
    x = torch.randn(images, 8, 1, tokens, requires_grad=True)
    head, saved = SERHead(block_size=block_size), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = head.loss([x], [x])
        loss.backward()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == '[memory]']
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return sum(saved.values()), int(held.max())


def test_memory_grows_linearly_with_tokens():
    step_memory(2)  # what is allocated once
    (saved, peak), (saved_4, peak_4) = step_memory(32), step_memory(128)
    matrix = 4 * (128 * 32) ** 2  # bytes of all logits of the larger one
    # Four times the tokens: four times the memory, and 16 times if it were quadratic. Peak memory
    # holds a few (block, tokens) matrices and a few (tokens, channels) ones. What torch's allocator
    # is asked for are tensors, whose sizes are no matter of the processor.
    assert saved_4 <= 4.2 * saved and peak_4 <= 4.2 * peak
    assert saved_4 < matrix / 10 and peak_4 < matrix / 4


@pytest.mark.parametrize('options', [dict(temperature=0), dict(temperature=-1), dict(block_size=0)])
def test_refuses_non_positive_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        SERHead(**options)
