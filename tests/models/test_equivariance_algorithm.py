"""EquivarianceAlgorithm: what its objective reaches, and that it only adds."""

import copy

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from ser_mm.draws import NUM_DRAWS
from ser_mm.models import EquivarianceAlgorithm
from ser_mm.views import ViewBatch
from tests.support import short_run
from tests.support.algorithms import IMAGE, PIXELS, build
from tests.support.heads import CASES, HEADS, SMALL, VIEWS, config, views

cases = pytest.mark.parametrize('name, base, form', CASES)


def batch(name, n=8, seed=0, dtype=torch.float32):
    """What the preprocessor hands over: two views with what was drawn, and extra views."""
    rng = torch.Generator().manual_seed(seed)

    def images(side):
        return torch.randn(n, 3, side, side, generator=rng, dtype=dtype)

    two = [
        ViewBatch(images(IMAGE), images(IMAGE)[:0], torch.zeros(0, dtype=torch.int64))
        for _ in range(2)
    ]
    for view in two:
        draws = torch.rand(n, NUM_DRAWS, generator=rng, dtype=dtype)
        view.draws = draws if VIEWS[name].get('record_draws') else None
    sides = [SMALL if name == 'essl' else IMAGE] * len(VIEWS[name].get('extra_views', []))
    return [*two, *map(images, sides)]


def model_of(name, base, form, **options):
    """In float64, and away from its start, where a ResNet's residual branches do nothing."""
    torch.manual_seed(0)
    model = build({**config(name, base, form), **options}).double().train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def gradients(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    params = [p.requires_grad_() for p in params]
    grads = torch.autograd.grad(
        loss, params, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return dict(zip(names, grads, strict=True))


def online(model):
    """Parameters of the branch that is trained, and of the objective."""
    momentum = ('algorithm.momentum_encoder', 'algorithm.target_net', 'algorithm.teacher')
    return {k for k, _ in model.named_parameters() if not k.startswith(momentum)}


def reached(model):
    """Names of the parameters that the objective trains."""
    backbone, depth = model.backbone, model.backbone.ser_layer
    if hasattr(backbone, 'layers'):
        depth = backbone.num_layers if depth is None else depth
        inside = ['patch_embed', 'pos_embed', *(f'layers.{i}.' for i in range(depth))]
        inside += ['cls_token'] if backbone.cls_layer < depth else []
        inside += ['ln1'] if depth == backbone.num_layers else []
    else:
        inside = ['conv1', 'gn1', *(f'layer{i + 1}.' for i in range(depth))]
    prefixes = ('equi_', *(f'algorithm.backbone.{name}' for name in inside))
    return {k for k in online(model) if k.startswith(prefixes)}


@cases
def test_the_objective_reaches_all_before_its_layer_and_nothing_else(name, base, form):
    model = model_of(name, base, form)
    losses = model.loss(batch(name, dtype=torch.float64))
    assert [k for k in losses if 'loss' in k] == ['loss_inv', 'loss_equi']
    grads = gradients(model, losses['loss_equi'])
    assert {k for k, grad in grads.items() if grad.any()} == reached(model)
    assert all(grad.isfinite().all() for grad in grads.values())
    figures = {k: v for k, v in losses.items() if 'loss' not in k}
    assert figures and all(v.ndim == 0 and not v.requires_grad for v in figures.values())


@pytest.mark.parametrize('name', HEADS)
def test_gradient_comes_through_every_view_that_carries_it(name):
    model = model_of(name, 'mocov3', 'original')
    inputs = batch(name, dtype=torch.float64)
    images = [x.base if isinstance(x, ViewBatch) else x for x in inputs]
    for x in images:
        x.requires_grad_()
    loss = model.loss(inputs)['loss_equi']
    grads = torch.autograd.grad(loss, images, allow_unused=True, materialize_grads=True)
    seen = [True, True, *[True] * (len(images) - 2)] if name != 'essl' else [False, False, True]
    assert [bool(grad.flatten(1).any(1).all()) for grad in grads] == seen
    if name == 'essl':
        assert not any(grad.any() for grad in grads[:2])


@cases
def test_loss_inv_is_that_of_the_wrapped_algorithm_on_its_views(name, base, form):
    """In the same operations, so bit by bit, gradients too; extra views never get there."""
    model = model_of(name, base, form)
    alone = copy.deepcopy(model.algorithm)
    inputs = batch(name, dtype=torch.float64)
    count = len(inputs) - len(VIEWS[name].get('extra_views', []))
    state = torch.get_rng_state()
    reported = alone.loss(batch(name, dtype=torch.float64)[:count], None)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    losses = model.loss(inputs)
    assert torch.equal(torch.get_rng_state(), after)
    expected = sum(value for key, value in reported.items() if 'loss' in key)
    assert torch.equal(losses['loss_inv'], expected)
    grads, expected = gradients(model, losses['loss_inv']), gradients(alone, expected)
    for k, grad in expected.items():
        assert torch.equal(grads[f'algorithm.{k}'], grad)


@cases
def test_without_weight_training_is_that_of_the_bare_algorithm(
    name, base, form, imagenet_tree, tmp_path
):
    """Bit by bit, after every one of 8 steps, with drop path that draws in every pass."""
    dropping = {} if form == 'resnet' else dict(drop_path_rate=0.2)
    cfg = dict(config(name, base, form, **dropping), loss_weight=0.0)
    bare = copy.deepcopy(cfg['algorithm'])
    stride = build(cfg).backbone.token_map_stride
    if form != 'resnet':
        layer = bare['backbone'].pop('ser_layer')
        bare['backbone'] = {'cls_layer': layer or 0, **bare['backbone']}
    reference = short_run.MULTI_VIEW
    bare['data_preprocessor'] = dict(type='SelfSupDataPreprocessor', **PIXELS)
    if name == 'stl':  # the same pairs, whose views come as SERDataPreprocessor hands them over
        reference = views('stl')
        bare['data_preprocessor'].update(type='SERDataPreprocessor', patch_size=stride)
    _, expected = short_run.run(bare, reference, imagenet_tree, tmp_path / 'bare')
    _, states = short_run.run(cfg, views(name), imagenet_tree, tmp_path / 'weightless')
    assert len(states) == len(expected) == 1 + 2 * 4
    for state, other in zip(states, expected, strict=True):
        assert [k for k in state if not k.startswith('equi_')] == list(other)
        assert [k for k in other if not torch.equal(state[k], other[k])] == []
    first, last = states[0], states[-1]
    moved = {k.split('.')[0] for k in first if not torch.equal(first[k], last[k])}
    assert {'backbone', 'neck'} <= moved


@pytest.mark.parametrize('name', HEADS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(name, imagenet_tree, tmp_path):
    cfg = config(name, 'mocov3', 'original')
    _, whole = short_run.run(cfg, views(name), imagenet_tree, tmp_path / 'whole')
    checkpoint = tmp_path / 'whole/epoch_1.pth'
    _, resumed = short_run.run(
        cfg, views(name), imagenet_tree, tmp_path / 'resumed', resume_from=checkpoint
    )
    for state, other in zip(whole[-4:], resumed[-4:], strict=True):
        assert [k for k in state if not torch.equal(state[k], other[k])] == []


def test_drop_path_of_extra_views_differs_from_step_to_step():
    model = build(config('essl', 'mocov3', 'original', drop_path_rate=0.5)).train()
    hub, inputs = MessageHub.get_current_instance(), batch('essl')
    losses = []
    for iteration in (3, 4, 3):
        hub.update_info('iter', iteration)
        torch.manual_seed(0)
        losses.append(copy.deepcopy(model).loss(inputs)['loss_equi'].item())
    assert losses[0] == losses[2] != losses[1]


@cases
def test_mixed_precision(name, base, form):
    model = build(config(name, base, form)).train()
    with torch.autocast('cpu', torch.bfloat16):
        total, _ = model.parse_losses(model.loss(batch(name)))
    total.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert total.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize('name', HEADS)
def test_state_dict_is_that_of_the_wrapped_algorithm_and_the_objective(name):
    model = build(config(name, 'mocov3', 'decoupled'))
    own = {k for k in model.state_dict() if k.startswith('equi_')}
    assert {k.split('.')[0] for k in own} == {'equi_norm', 'equi_head'}
    other = copy.deepcopy(model.algorithm)
    result = other.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == [] and set(result.unexpected_keys) == own
    twin = build(config(name, 'mocov3', 'decoupled'))
    twin.load_state_dict(model.state_dict(), strict=True)
    result = twin.load_state_dict(other.state_dict(), strict=False)
    counts = {k for k in own if k.endswith('num_batches_tracked')}  # torch fills these in itself
    assert result.unexpected_keys == [] and set(result.missing_keys) == own - counts


@pytest.mark.parametrize('name', ['equimod', 'essl'])
def test_extra_views_of_a_decoupled_head_run_its_blocks_alone(name):
    """Counted: block 3 sees the two views, blocks 1 and 2 the extra ones as well."""
    model = build(config(name, 'simsiam', 'decoupled'))
    calls = [0] * 4
    for i, layer in enumerate(model.backbone.layers):
        layer.ln1.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model.loss(batch(name))
    assert calls == [3, 3, 2, 2]


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(head=dict(type='AugSelfHead', in_channels=7)), 'in_channels=7, .* 48 channels'),
        (
            dict(data_preprocessor=dict(photometry=[[], []], **PIXELS)),
            'AugSelfHead needs the draws .*photometry draws on the device',
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_build(change, message):
    with pytest.raises(ValueError, match=message):
        build({**config('augself', 'mocov3', 'original'), **change})


def test_a_head_of_the_other_wrapper_is_refused():
    cfg = config('augself', 'mocov3', 'decoupled')
    with pytest.raises(ValueError, match='head.type=SERHead .* SERAlgorithm around'):
        build({**cfg, 'head': dict(type='SERHead')})
    cfg.update(type='SERAlgorithm')
    for head in (cfg['head'], dict(cfg['head'], in_channels=48)):
        with pytest.raises(ValueError, match="AugSelfHead .* type='EquivarianceAlgorithm'"):
            build({**cfg, 'head': head})


def test_a_backbone_without_features_is_refused():
    cfg = config('augself', 'mocov3', 'original')
    cfg['algorithm']['backbone'] = dict(
        type='VisionTransformer', arch='deit-tiny', img_size=IMAGE, patch_size=16
    )
    with pytest.raises(ValueError, match="type='SERVisionTransformer'"):
        build(cfg)


def test_missing_views_and_draws_are_named():
    inputs = batch('equimod')
    model = build(config('equimod', 'mocov3', 'original'))
    with pytest.raises(ValueError, match='views=2 reach EquiModHead, which needs 1 .*extra_views'):
        model.loss(inputs[:2])
    inputs[0].draws = inputs[1].draws = None
    with pytest.raises(ValueError, match='EquiModHead needs what was drawn .* record_draws=True'):
        model.loss(inputs)


@pytest.mark.parametrize(
    'name, pipeline, message',
    [
        ('augself', views('essl'), 'extra_views has 1 entries, but AugSelfHead needs 0'),
        ('augself', views('stl'), 'record_draws=False, but AugSelfHead needs True; set record'),
        ('stl', views('augself'), 'pair_draws=False, but STLHead needs True; set pair_draws=True'),
        ('essl', views('augself'), 'extra_views has 0 entries, but RotationHead needs 1'),
    ],
)
def test_views_for_another_head_are_refused_before_the_first_step(
    name, pipeline, message, imagenet_tree, tmp_path
):
    with pytest.raises(ValueError, match=message):
        short_run.run(config(name, 'mocov3', 'original'), pipeline, imagenet_tree, tmp_path)


def test_a_momentum_branch_that_is_not_there_is_refused():
    head = dict(HEADS['augself'], other='momentum')
    build({**config('augself', 'mocov3', 'original'), 'head': head})
    with pytest.raises(ValueError, match="SimSiam has no momentum branch; set head.other='online'"):
        build({**config('augself', 'simsiam', 'original'), 'head': head})


@pytest.mark.parametrize('num_workers', [0, 1])
def test_extra_views_of_several_sizes_are_refused(num_workers, imagenet_tree):
    resize = dict(type='RandomResize', scale=(64, 64), ratio_range=(0.5, 1.0))
    pipeline = dict(views('essl'), extra_views=[[resize]])
    steps = [dict(type='LoadImageFromFile'), pipeline, dict(type='PackInputs')]
    data = dict(type='CustomDataset', data_root=str(imagenet_tree), data_prefix='train')
    loader = Runner.build_dataloader(
        dict(
            batch_size=16,
            num_workers=num_workers,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            dataset=dict(data, pipeline=steps),
        )
    )
    with pytest.raises(ValueError, match='images of a batch differ in size .* to one size'):
        next(iter(loader))


def test_draws_beside_b2_are_refused():
    for option in ('record_draws', 'pair_draws'):
        pipeline = dict(views('essl'), equi_ratio=0.1, **{option: True})
        with pytest.raises(ValueError, match=f'{option}=True .* set equi_ratio=0'):
            Runner.build_dataloader(
                dict(
                    batch_size=2,
                    sampler=dict(type='DefaultSampler'),
                    dataset=dict(type='CustomDataset', data_root='.', pipeline=[pipeline]),
                )
            )


def test_losses_are_weighted():
    inputs = batch('essl')
    model = build(config('essl', 'mocov3', 'original'))
    assert isinstance(model, EquivarianceAlgorithm)
    once = copy.deepcopy(model).loss(inputs)['loss_equi']
    model.loss_weight = 3.0
    torch.testing.assert_close(model.loss(inputs)['loss_equi'], 3 * once)
