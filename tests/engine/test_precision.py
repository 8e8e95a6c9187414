"""Mixed precision on CPUs: who gets it, and what a step computes in it."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from ser_mm.engine import precision
from ser_mm.engine.cpu import adapt_to_device
from tests.support.algorithms import ALGORITHMS, build

OPTIMIZER = dict(type='SGD', lr=0.1)
HAS = 'flags : fpu avx512f avx512_bf16 amx_tile\n'


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Says what the processor is to be, in Linux's words."""

    def say(text):
        file = tmp_path / 'cpuinfo'
        file.write_text(text)
        monkeypatch.setattr(precision, '_CPU_INFO', file)

    return say


def adapted(**options):
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=OPTIMIZER, **options)))
    adapt_to_device(cfg)
    return cfg.optim_wrapper


@pytest.mark.parametrize('flags', [HAS, 'flags : amx_bf16\n'])
@pytest.mark.parametrize('dtype', ['bfloat16', torch.bfloat16], ids=str)
def test_bfloat16_is_what_a_config_gets_that_asks_for_it(processor, flags, dtype):
    processor(flags)
    asked = adapted(dtype=dtype, loss_scale='dynamic', clip_grad=dict(max_norm=1.0))
    kind = 'mmpretrain.CPUAmpOptimWrapper'
    assert asked == dict(type=kind, optimizer=OPTIMIZER, clip_grad=dict(max_norm=1.0))


@pytest.mark.parametrize(
    ('flags', 'options'),
    [
        (HAS, {}),  # float16
        (HAS, dict(dtype='float16', loss_scale='dynamic')),
        ('flags : avx512f avx512bw\n', dict(dtype='bfloat16')),  # would be emulated
    ],
)
def test_float32_is_what_the_others_get(processor, flags, options):
    processor(flags)
    assert adapted(**options) == dict(type='OptimWrapper', optimizer=OPTIMIZER)


def test_other_systems_are_taken_for_processors_without(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, '_CPU_INFO', tmp_path / 'missing')
    assert not precision.has_bfloat16()


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
