"""Mixed precision on CPUs: who gets it, and what a step computes in it."""

import time

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from ser_mm.engine import cpu
from ser_mm.engine.cpu import adapt_to_device
from ser_mm.engine.precision import CPUAmpOptimWrapper, is_bfloat16_faster
from tests.support.algorithms import ALGORITHMS, build
from tests.support.two_ranks import on_two_ranks

OPTIMIZER = dict(type='SGD', lr=0.1)


@pytest.fixture
def processor(monkeypatch):
    """Says whether the processor is to be faster in bfloat16; it is not tried then."""
    return lambda faster: monkeypatch.setattr(cpu, 'is_bfloat16_faster', lambda: faster)


def adapted(**options):
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=OPTIMIZER, **options)))
    adapt_to_device(cfg)
    return cfg.optim_wrapper


@pytest.mark.parametrize('dtype', ['bfloat16', torch.bfloat16], ids=str)
def test_bfloat16_is_what_a_config_gets_that_asks_for_it(processor, dtype):
    processor(True)
    asked = adapted(dtype=dtype, loss_scale='dynamic', clip_grad=dict(max_norm=1.0))
    kind = 'mmengine.CPUAmpOptimWrapper'
    assert asked == dict(type=kind, optimizer=OPTIMIZER, clip_grad=dict(max_norm=1.0))
    init_default_scope('mmpretrain')
    assert type(build_optim_wrapper(torch.nn.Linear(1, 1), asked)) is CPUAmpOptimWrapper


@pytest.mark.parametrize(
    ('faster', 'options'),
    [
        (True, {}),  # float16
        (True, dict(dtype='float16', loss_scale='dynamic')),
        (False, dict(dtype='bfloat16')),
    ],
)
def test_float32_is_what_the_others_get(processor, faster, options):
    processor(faster)
    assert adapted(**options) == dict(type='OptimWrapper', optimizer=OPTIMIZER)


def test_the_processor_is_tried_and_draws_nothing(monkeypatch):
    state = torch.get_rng_state()
    is_bfloat16_faster.cache_clear()
    assert is_bfloat16_faster() in (True, False)
    assert torch.equal(torch.get_rng_state(), state)

    product, slow = torch.Tensor.__matmul__, torch.bfloat16
    for slow in (torch.bfloat16, torch.float32):

        def multiply(a, b, slow=slow):
            time.sleep(0.02 if a.dtype == slow else 0)
            return product(a[:2], b)

        monkeypatch.setattr(torch.Tensor, '__matmul__', multiply)
        is_bfloat16_faster.cache_clear()
        assert is_bfloat16_faster() == (slow == torch.float32)
    is_bfloat16_faster.cache_clear()


def both_ranks(rank, faster):
    return cpu._agreed(faster[rank])


@pytest.mark.slow
def test_ranks_train_in_one_precision():
    assert on_two_ranks(both_ranks, [True, False]) == [False, False]
    assert on_two_ranks(both_ranks, [True, True]) == [True, True]


def step(images, **options):
    """A step of a tiny MoCo v3 with SER; its model, and the dtypes that a linear layer gave."""
    torch.manual_seed(0)
    model = build(ALGORITHMS['mocov3']).train()
    before = {name: x.clone() for name, x in model.named_parameters()}
    wrapper = build_optim_wrapper(model, dict(optimizer=OPTIMIZER, **options))
    seen = set()
    layer = model.backbone.layers[0].attn.qkv
    layer.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    losses = model.train_step(dict(inputs=images, data_samples=None), wrapper)
    moved = {
        name: x.detach() - before[name] for name, x in model.named_parameters() if x.requires_grad
    }
    return losses['loss'].item(), moved, seen, wrapper


def test_a_step_in_bfloat16_is_that_in_float32_to_its_rounding():
    images = [torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    record = torch.full((8, 2), -1)
    record[5:] = torch.tensor([[0, 3], [5, 2], [7, 4]])
    loss, moved, seen, wrapper = step([*images, record], type='CPUAmpOptimWrapper')
    exact, moved_exactly, seen_exactly, plain = step([*images, record], type='OptimWrapper')
    assert (seen, seen_exactly) == ({torch.bfloat16}, {torch.float32})
    assert wrapper.state_dict().keys() == plain.state_dict().keys()  # either resumes the other
    assert loss == pytest.approx(exact, rel=0.05) and loss != exact
    assert {x.dtype for x in moved.values()} == {torch.float32}
    flat, flat_exact = (
        torch.cat([x.flatten() for x in m.values()]) for m in (moved, moved_exactly)
    )
    assert torch.cosine_similarity(flat, flat_exact, dim=0) > 0.9
