"""DINO by itself: its loss and teacher, its schedules, what it costs."""

import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn

from ser_mm.models import DINOHead, DINONeck
from tests.support.algorithms import (
    BACKBONE,
    EMBED_DIMS,
    IMAGE,
    PATCH,
    PIXELS,
    build,
    dino,
    mlp,
    two_views,
    with_ser,
)
from tests.support.paths import ROOT
from tests.support.rounding import assert_far_above_rounding
from tests.support.two_ranks import on_two_ranks

MOMENTUM, STEPS = 0.3, 3
CHANNELS = 6
# Of float64, see test_tolerance_is_far_above_rounding.
CLOSE = dict(rtol=1e-9, atol=1e-10)


@MODELS.register_module(force=True)
class FlatBackbone(nn.Module):
    """A linear layer on flattened images, of any dtype."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, CHANNELS)

    def forward(self, x):
        return (self.fc(x.flatten(1)),)


def flat_dino(fixed_norm=False):
    torch.manual_seed(0)
    config = dict(
        type='DINO',
        base_momentum=MOMENTUM,
        backbone=dict(type='FlatBackbone'),
        neck=dict(
            type='DINONeck',
            in_channels=CHANNELS,
            hid_channels=8,
            bottleneck_channels=4,
            out_channels=10,
            fixed_norm=fixed_norm,
        ),
        head=dict(type='DINOHead', out_channels=10, warmup_epochs=3),
    )
    return build(config, max_iters=STEPS).double()


def batches(n=6, views=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, views, n, 3, 2, 2, generator=rng, dtype=torch.float64)


def logits(weights, x):
    """The network of ``flat_dino`` from its weights, by the formulas of the paper."""
    w = weights
    x = x.flatten(1) @ w['fc.weight'].T + w['fc.bias']
    for i in (0, 2, 4):
        if i:
            x = x * (1 + torch.erf(x / 2**0.5)) / 2
        x = x @ w[f'mlp.{i}.weight'].T + w[f'mlp.{i}.bias']
    x = x / x.square().sum(1, keepdim=True).sqrt()
    v = w['last_layer.direction']
    return x @ (w['last_layer.norm'][:, None] * v / v.square().sum(1, keepdim=True).sqrt()).T


def log_softmax(x):
    return x - x.exp().sum(1, keepdim=True).log()


def weights_of(*modules):
    return {
        name: parameter.detach().clone()
        for module in modules
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize('fixed_norm', [False, True])
def test_tolerance_is_far_above_rounding(fixed_norm):
    """After three steps of training."""
    results = []
    for dtype in (torch.float64, torch.float32):
        losses, state = train(fixed_norm=fixed_norm, dtype=dtype)
        floats = [value for value in state.values() if value.is_floating_point()]
        results.append([losses, *floats])
    assert_far_above_rounding(*results, **CLOSE)


@pytest.mark.parametrize('views', [2, 4])
def test_three_steps_equal_an_independent_computation(views):
    model = flat_dino()
    student = weights_of(model.backbone, model.neck)
    teacher, center = {}, torch.zeros(10, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    temperatures = 0.04, 0.055, 0.07  # the three epochs of the warm-up
    for step, inputs in enumerate(batches(views=views)):
        MessageHub.get_current_instance().update_info('epoch', step)
        loss = model.loss(list(inputs))['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        student = {name: w.requires_grad_() for name, w in student.items()}
        # MMPretrain's momentum, whose angle of two operations in float32 is off by 4e-7.
        share = torch.zeros((), dtype=torch.float64)
        model.teacher.avg_func(share, torch.ones_like(share), torch.tensor(step))
        share = share.item()
        by_hand = MOMENTUM * (math.cos(math.pi * step / STEPS) + 1) / 2
        assert share == pytest.approx(by_hand, abs=MOMENTUM / 2 * 4e-7)
        keep = 1 - share if step else 0
        teacher = {
            name: keep * teacher.get(name, 0) + (1 - keep) * w.detach()
            for name, w in student.items()
        }
        t = [logits(teacher, x) for x in inputs[:2]]
        s = [logits(student, x) for x in inputs]
        expected, pairs = 0, 0
        for i in range(2):
            p = ((t[i] - center) / temperatures[step]).exp()
            p = p / p.sum(1, keepdim=True)
            for j in range(views):
                if i != j:
                    expected = expected - (p * log_softmax(s[j] / 0.1)).sum() / len(p)
                    pairs += 1
        expected = expected / pairs
        center = 0.9 * center + 0.1 * torch.cat(t).mean(0)
        grads = torch.autograd.grad(expected, list(student.values()))
        student = {
            name: (w - 0.5 * g).detach()
            for (name, w), g in zip(student.items(), grads, strict=True)
        }

        torch.testing.assert_close(loss, expected, **CLOSE)
        torch.testing.assert_close(model.head.center, center, **CLOSE)
        for mine, module in ((student, (model.backbone, model.neck)), (teacher, model.teacher)):
            modules = module if isinstance(module, tuple) else module.module
            for name, w in weights_of(*modules).items():
                torch.testing.assert_close(w, mine[name], **CLOSE)
    assert not torch.equal(model.head.center, torch.zeros(10))


def test_teacher_leaves_the_student_and_its_own_start():
    model = flat_dino()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    start = weights_of(model.backbone, model.neck)
    first, second, _ = batches()

    def step(inputs):
        optimizer.zero_grad()
        model.loss(list(inputs))['loss'].backward()
        optimizer.step()
        return weights_of(*model.teacher.module), weights_of(model.backbone, model.neck)

    teacher, student = step(first)
    assert all(torch.equal(teacher[name], start[name]) for name in start)
    assert not any(torch.equal(teacher[name], student[name]) for name in start)
    teacher, _ = step(second)
    assert not any(torch.equal(teacher[name], start[name]) for name in start)
    assert not any(torch.equal(teacher[name], student[name]) for name in start)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def train(rank=None, fixed_norm=False, dtype=torch.float64):
    """Three steps, of a whole batch or, in DDP, of this rank's half; what is learned by them."""
    model = flat_dino(fixed_norm).to(dtype)
    wrapped = model if rank is None else MMDistributedDataParallel(model, broadcast_buffers=False)
    # AdamW divides gradients by their size plus eps, and rounding by eps at least.
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01, eps=1e-4)
    losses = []
    for step, inputs in enumerate(batches().to(dtype)):
        MessageHub.get_current_instance().update_info('epoch', step)
        half = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
        loss = wrapped(list(inputs[:, half]), mode='loss')['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=dtype), model.state_dict()


def train_both(rank=None):
    return [train(rank, fixed_norm) for fixed_norm in (False, True)]


@pytest.mark.slow
def test_two_ranks_agree_with_one():
    for (losses, state), *ranks in zip(train_both(), *on_two_ranks(train_both), strict=True):
        torch.testing.assert_close(sum(rank[0] for rank in ranks) / 2, losses, **CLOSE)
        for _, other in ranks:
            for name, value in state.items():
                torch.testing.assert_close(other[name], value, **CLOSE)


def test_temperature_follows_the_epoch_of_the_runner():
    head = DINOHead(out_channels=4, warmup_epochs=10)
    hub = MessageHub.get_current_instance()
    schedule = np.linspace(0.04, 0.07, 10)  # as in DINO's release
    for epoch, expected in [*enumerate(schedule), (10, 0.07), (99, 0.07)]:
        hub.update_info('epoch', epoch)
        assert head.current_teacher_temperature() == pytest.approx(expected)
    hub.update_info('epoch', 0)
    assert DINOHead(4, warmup_epochs=0).current_teacher_temperature() == 0.07


@pytest.mark.parametrize(
    'options',
    [
        dict(student_temperature=0),
        dict(teacher_temperature=-1),
        dict(warmup_teacher_temperature=0),
        dict(center_momentum=1.1),
    ],
)
def test_refuses_impossible_options(options):
    with pytest.raises(ValueError, match=rf'{next(iter(options))}=.* must be '):
        DINOHead(4, **options)


def test_norm_of_the_last_layer_is_fixed_or_trained():
    for fixed_norm in (True, False):
        neck = DINONeck(5, 8, 4, 7, fixed_norm=fixed_norm).double()
        neck.init_weights()
        with torch.no_grad():
            neck.last_layer.direction.mul_(3)  # of no consequence
        (out,) = neck((torch.randn(6, 5, dtype=torch.float64),))
        out.square().sum().backward()
        norm = neck.last_layer.norm
        assert (norm.grad is None) == fixed_norm == (not norm.requires_grad)
        units = torch.eye(4, dtype=torch.float64)
        rows = neck.last_layer(units).T.norm(dim=1)
        torch.testing.assert_close(rows, torch.ones_like(rows), **CLOSE)
        # Cosines: both the bottleneck and the prototypes have length 1.
        assert out.abs().max() <= 1 + 1e-12
    with torch.no_grad():
        norm.mul_(2)
    torch.testing.assert_close(neck.last_layer(units).T.norm(dim=1), 2 * rows, **CLOSE)


DROPPING = {
    'MMPretrain': dict(BACKBONE, ser_layer=None, drop_path_rate=0.6),
    'timm': dict(
        type='SERTimmViT',
        model='vit_tiny_patch16_224',
        model_args=dict(
            img_size=IMAGE,
            patch_size=PATCH,
            embed_dim=EMBED_DIMS,
            depth=4,
            num_heads=3,
            drop_path_rate=0.6,
        ),
    ),
}


@pytest.mark.parametrize('library', DROPPING)
def test_drop_path_is_in_the_student_only(library):
    torch.manual_seed(0)
    backbone = DROPPING[library]
    if library == 'timm':
        pytest.importorskip('timm')
    model = build(dino(backbone, mlp(48))).double().train()
    model.teacher.update_parameters(nn.Sequential(model.backbone, model.neck))
    x = torch.randn(4, 3, IMAGE, IMAGE, dtype=torch.float64)
    student, again = (model.neck(model.backbone(x))[0] for _ in range(2))
    assert not torch.equal(student, again)
    teacher, again = (model.teacher(x)[0] for _ in range(2))
    assert torch.equal(teacher, again)
    model.eval()
    torch.testing.assert_close(teacher, model.neck(model.backbone(x))[0], **CLOSE)


@pytest.mark.parametrize('ser', [False, True])
def test_local_crops_go_through_the_student_only_once_per_resolution(ser):
    config = dino(BACKBONE, mlp(48))
    model = build(with_ser(config) if ser else config)
    base = model.algorithm if ser else model
    calls = Counter()
    for name, backbone in (('student', base.backbone), ('teacher', base.teacher.module[0])):
        backbone.register_forward_pre_hook(
            lambda _, args, name=name: calls.update([(name, len(args[0]))])
        )
    views = two_views(n1=6, n2=3) if ser else [torch.randn(9, 3, IMAGE, IMAGE) for _ in range(2)]
    local = [torch.randn(9, 3, side, side) for side in (16, 24, 16, 16)]
    losses = model.loss([*views, *local], [DataSample()] * 9)
    assert calls == {('student', 9): 3, ('student', 27): 1, ('teacher', 9): 2}
    sum(losses.values()).backward()
    without = model.loss(views, [DataSample()] * 9)
    key = 'loss_inv' if ser else 'loss'
    assert losses[key] != without[key]


def test_crops_of_one_resolution_are_told_apart_again():
    """The loss does not depend on whether crops share a resolution, but for the rounding."""
    model = flat_dino()
    inputs = list(batches(views=4)[0])
    together = model.loss(inputs)['loss']
    model.head.center.zero_()
    apart = [*inputs[:3], inputs[3].reshape(-1, 3, 1, 4)]  # the same numbers, another shape
    torch.testing.assert_close(model.loss(apart)['loss'], together, **CLOSE)


class Views(torch.utils.data.Dataset):
    """Two views of noise, 8 images."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        rng = torch.Generator().manual_seed(i)
        views = [torch.randint(256, (3, IMAGE, IMAGE), generator=rng).byte() for _ in range(2)]
        return dict(inputs=views, data_samples=DataSample())


class Watch(Hook):
    """Notes every weight decay, by the dimensions of the parameters, in each iteration."""

    def __init__(self):
        self.decays = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        groups = runner.optim_wrapper.optimizer.param_groups
        self.decays.append({(p.ndim > 1, g['weight_decay']) for g in groups for p in g['params']})


def run(rank, work_dir, resume=False):
    """Train a small DINO by the optimizer, schedule and hooks of the shipped recipe."""
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(ROOT / 'configs' / 'dino_vits16.py')
    pixels = dict(type='SelfSupDataPreprocessor', **PIXELS)
    model = dino(dict(BACKBONE, ser_layer=None, drop_path_rate=0.1), mlp(48))
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale')
    decay = cfg.param_scheduler[-1]
    assert decay.param_name == 'weight_decay' and decay.T_max == decay.end == 100
    decay.update(T_max=3, end=3)
    (freeze,) = (hook for hook in cfg.custom_hooks if hook.type == 'FreezeLayerHook')
    assert freeze.get('epochs', 1) == 1
    freeze.epochs = 2
    watch = Watch()
    runner = Runner(
        model=dict(model, data_preprocessor=pixels),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=Views(),
            batch_size=4 if rank is None else 2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=[decay],
        custom_hooks=[*cfg.custom_hooks, watch],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        launcher='none' if rank is None else 'pytorch',
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
            )
        ),
        resume=resume,
        randomness=dict(seed=0),
        default_scope='mmpretrain',
        experiment_name=f'{Path(work_dir).name}-{resume}',
        log_level='WARNING',
    )
    runner.train()
    return watch.decays


def state(folder, epoch):
    return torch.load(folder / f'epoch_{epoch}.pth', weights_only=False)['state_dict']


def assert_frozen_for_two_of_three_epochs(folder):
    one, two, three = (state(folder, epoch) for epoch in (1, 2, 3))
    last = [name for name in one if name.startswith('neck.last_layer.')]
    assert len(last) == 2
    for name in last:
        assert torch.equal(one[name], two[name]) and not torch.equal(two[name], three[name])
    for name in ('neck.mlp.4.weight', 'backbone.layers.0.attn.qkv.weight', 'head.center'):
        assert not torch.equal(one[name], two[name])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Three epochs of two iterations: the folder and the weight decays."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, run(None, folder)


def test_last_layer_is_frozen_at_first(trained):
    assert_frozen_for_two_of_three_epochs(trained[0])


def test_weight_decay_grows_by_a_cosine_and_spares_vectors(trained):
    expected = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert len(trained[1]) == 6
    for groups, decay in zip(trained[1], expected, strict=True):
        assert {decays for decays, _ in groups} == {False, True}
        for decays, value in groups:
            assert value == (pytest.approx(decay) if decays else 0)


def test_resumes_with_frozen_layer_schedules_and_teacher(trained, tmp_path):
    shutil.copy(trained[0] / 'epoch_1.pth', tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    decays = run(None, tmp_path, resume=True)
    assert [dict(d) for d in decays] == [
        {key: pytest.approx(value) for key, value in d} for d in trained[1][2:]
    ]
    for epoch in (2, 3):
        whole, resumed = state(trained[0], epoch), state(tmp_path, epoch)
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert torch.equal(resumed[name], value), name  # by the same operations


@pytest.mark.slow
def test_last_layer_is_frozen_at_first_in_ddp(tmp_path):
    on_two_ranks(run, tmp_path)
    assert_frozen_for_two_of_three_epochs(tmp_path)


def test_freezing_a_layer_that_is_not_there_is_refused(tmp_path):
    from ser_mm.engine import FreezeLayerHook

    runner = type('Run', (), dict(model=flat_dino()))
    with pytest.raises(ValueError, match="layer='neck.last'"):
        FreezeLayerHook(layer='neck.last').before_train(runner)


def test_softmax_of_large_logits_stays_finite():
    head = DINOHead(out_channels=4, teacher_temperature=1e-4, warmup_epochs=0)
    student = [(1e4 * F.one_hot(torch.arange(4)).float()).requires_grad_() for _ in range(2)]
    loss = head.loss(student, [x.detach().flip(0) for x in student])
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, student))
