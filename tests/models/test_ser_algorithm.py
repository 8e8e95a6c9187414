"""SERAlgorithm: what each loss reaches, what it is worth, and that it only adds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub

from benchmarks.step import in_one_pass
from tests.support import reference, short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE, EMBED_DIMS, build, two_views
from tests.support.rounding import assert_far_above_rounding

# Of float64, see test_tolerances_are_far_above_rounding; gradients are around 1e-3.
CLOSE = dict(rtol=1e-8, atol=1e-10)

algorithms = pytest.mark.parametrize('name', ALGORITHMS)


def model_of(name, seed=0, **options):
    """In float64, and with a momentum branch that has fallen behind."""
    torch.manual_seed(seed)
    config = copy.deepcopy(ALGORITHMS[name])
    model = build({**config, **options}).double().train()
    with torch.no_grad():
        model.loss(two_views(dtype=torch.float64))
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def gradients(model, loss):
    names, params = zip(*model.named_parameters(), strict=True)
    params = [p.requires_grad_() for p in params]  # of frozen ones too, there must be none
    grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize('name', ALGORITHMS)
def test_tolerances_are_far_above_rounding(name):
    """Of losses and gradients; but where a ReLU is close to 0, float32 may switch it over."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = model_of(name).to(dtype)
        views = two_views(dtype=torch.float64)
        for view in views:
            view.base, view.equi = view.base.to(dtype), view.equi.to(dtype)
        losses = model.loss(views)
        total = losses['loss_inv'] + losses['loss_ser']
        grads = {} if name.endswith('_resnet') else gradients(model, total)
        results.append([losses['loss_inv'], losses['loss_ser'], *grads.values()])
    assert_far_above_rounding(*results, **CLOSE)


def reached(model):
    """Names of the parameters that the equivariance loss trains."""
    depth = model.backbone.ser_layer
    if hasattr(model.backbone, 'layers'):
        inside = ['patch_embed', 'pos_embed', *(f'layers.{i}.' for i in range(depth))]
    else:
        inside = ['conv1', 'gn1', 'stem', *(f'layer{i + 1}.' for i in range(depth))]
    prefixes = ('ser_neck.', *(f'algorithm.backbone.{name}' for name in inside))
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@algorithms
def test_loss_ser_reaches_all_before_its_layer_and_nothing_else(name):
    model = model_of(name)
    losses = model.loss(two_views(dtype=torch.float64))
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    grads = gradients(model, losses['loss_ser'])
    assert {k for k, grad in grads.items() if grad.any()} == reached(model)
    assert reached(model) <= trained
    assert all(grads[k].isfinite().all() for k in grads)
    # LayerNorm and both linear layers of the neck, and not a row of them idle
    for k in ('0.weight', '0.bias', '1.weight', '3.weight'):
        assert grads[f'ser_neck.layers.{k}'].flatten(1 if k[0] != '0' else 0).any(-1).all()


def project(neck, token_map):
    """LayerNorm, 1x1 convolution, GELU, 1x1 convolution."""
    norm, fc1, _, fc2 = neck.layers
    x = token_map.permute(0, 2, 3, 1)
    x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
    return F.conv2d(F.gelu(F.conv2d(x, fc1.weight[:, :, None, None])), fc2.weight[:, :, None, None])


def loss_ser(model, views, detach_keys):
    """The equivariance loss by its definition, image by image."""
    (momentum,) = {x for x in views[0].token_maps if x is not model.backbone} or {None}
    queries = [project(model.ser_neck, reference.token_map(model.backbone, v.equi)) for v in views]
    keys = queries
    if momentum is not None:
        assert any(
            not torch.equal(a, b)
            for a, b in zip(momentum.parameters(), model.backbone.parameters(), strict=True)
        )
        keys = [project(model.ser_neck, reference.token_map(momentum, v.equi)) for v in views]
    if detach_keys or momentum is not None:
        keys = [k.detach() for k in keys]
    e_1, e_2 = (v.elements for v in views)
    size_1, size_2 = (q.shape[-2:] for q in queries)
    moved = reference.relate(keys[1], e_2, e_1, size_1), reference.relate(keys[0], e_1, e_2, size_2)
    same_view = keys if model.ser_head.negatives == 'both' else [(), ()]
    losses = [
        reference.info_nce(q, k, model.ser_head.temperature, same)
        for q, k, same in zip(queries, moved, same_view, strict=True)
    ]
    return sum(losses) / 2


@pytest.mark.parametrize(
    'detach_keys, negatives', [(False, 'other'), (True, 'other'), (False, 'both')]
)
@algorithms
def test_loss_ser_is_its_definition(name, detach_keys, negatives, monkeypatch):
    reference.float64_positions(monkeypatch)
    head = dict(type='SERHead', temperature=0.5, negatives=negatives)
    model = model_of(name, detach_keys=detach_keys, head=head, loss_weight=0.7)
    grids = ((2, 3), (2, 2))
    views = two_views(2, 3, grids, torch.tensor([[1, 5, 2], [0, 3, 6]]), dtype=torch.float64)
    losses = model.loss(views)
    expected = 0.7 * loss_ser(model, views, detach_keys)
    torch.testing.assert_close(losses['loss_ser'], expected, **CLOSE)
    expected = gradients(model, expected)
    for k, grad in gradients(model, losses['loss_ser']).items():
        torch.testing.assert_close(grad, expected[k], **CLOSE, msg=lambda m, k=k: f'{k}: {m}')


def with_separate_passes(algorithm):
    """A copy whose backbones embed b1 and b2 in two ordinary passes, and know no more of SER."""

    def forward(self, x):
        passes = [super(type(self), self).forward(part) for part in (x.base, x.equi) if len(part)]
        outs = [
            torch.cat([y if y.ndim == 2 else y.mean((2, 3), True) for y in part])
            for part in zip(*passes, strict=True)
        ]
        return tuple(outs)

    algorithm = copy.deepcopy(algorithm)
    for module in algorithm.modules():
        if hasattr(module, 'token_map_stride'):
            kind = type(module)
            module.__class__ = type(f'Separate{kind.__name__}', (kind,), dict(forward=forward))
    return algorithm


@pytest.mark.parametrize('n2', [0, 1, 4])
@algorithms
def test_loss_inv_is_that_of_the_wrapped_algorithm(name, n2, monkeypatch):
    reference.float64_positions(monkeypatch)
    model = model_of(name)
    alone = with_separate_passes(model.algorithm)
    views = two_views(4, n2, dtype=torch.float64)
    losses = model.loss(views)
    assert [key for key in losses if 'loss' in key] == ['loss_inv', 'loss_ser']
    if n2 == 0:
        assert losses['loss_ser'] == 0
    reported = alone.loss(two_views(4, n2, dtype=torch.float64), None)
    expected = sum(value for key, value in reported.items() if 'loss' in key)
    torch.testing.assert_close(losses['loss_inv'], expected, **CLOSE)
    grads, expected = gradients(model, losses['loss_inv']), gradients(alone, expected)
    assert not any(grads[k].any() for k in grads if k.startswith('ser_neck.'))
    assert any(grad.any() for grad in expected.values())
    for k, grad in expected.items():
        torch.testing.assert_close(
            grads[f'algorithm.{k}'], grad, **CLOSE, msg=lambda m, k=k: f'{k}: {m}'
        )


@pytest.mark.parametrize('n2', [0, 4])
@algorithms
def test_loss_inv_of_b1_and_b2_apart(name, n2):
    """By the head's own loss of the rows of each, after one pass of backbone and projector."""
    model = model_of(name, invariance='apart')
    twin = copy.deepcopy(model)
    taken, wholes = [], []
    own = type(twin.algorithm.head).loss

    def keep(*sides):
        taken.append(sides)
        wholes.append(own(twin.algorithm.head, *sides))
        return wholes[-1]

    twin.invariance, twin.algorithm.head.loss = 'together', keep
    together = twin.loss(two_views(4, n2, dtype=torch.float64))['loss_inv']
    head = copy.deepcopy(model.algorithm.head)
    expected = 0
    for sides in taken:
        for part in [slice(4)] + [slice(4, None)] * (n2 > 0):
            rows = [
                [x[part] for x in side] if isinstance(side, list) else side[part] for side in sides
            ]
            expected = expected + copy.deepcopy(head).loss(*rows)
    expected = expected * (together / sum(wholes)).detach()  # some take the mean, some the sum
    losses = model.loss(two_views(4, n2, dtype=torch.float64))
    torch.testing.assert_close(losses['loss_inv'], expected, **CLOSE)
    assert 'loss' not in vars(model.algorithm.head)
    # DINO's centre moved twice, the second time alone by the few images of b2.
    heads = [x.algorithm.head.buffers(recurse=False) for x in (model, twin)]
    for found, whole in zip(*heads, strict=True):
        torch.testing.assert_close(found, whole, **CLOSE)
    assert any(grad.any() for grad in gradients(model, losses['loss_inv']).values())


def test_a_head_with_a_constant_learns_apart():
    """What the head does not move stays untouched, as gradients may need it."""
    model = model_of('simsiam', invariance='apart')
    head = model.algorithm.head
    head.register_buffer('weight_of_loss', torch.tensor(2.0, dtype=torch.float64))
    own = head.loss
    head.loss = lambda *sides: own(*(side * head.weight_of_loss for side in sides))
    loss = model.loss(two_views(4, 4, dtype=torch.float64))['loss_inv']
    assert any(grad.any() for grad in gradients(model, loss).values())


@pytest.mark.parametrize('name', ['mocov3', 'dino', 'barlowtwins'])
def test_50_steps_end_where_they_do_with_two_passes(name, monkeypatch):
    """b2 of other sizes in every step, and at times none."""
    reference.float64_positions(monkeypatch)
    models = [model_of(name) for _ in range(2)]
    for model, one_pass in zip(models, (True, False), strict=True):
        in_one_pass(one_pass)(model)
    # AdamW divides a gradient by its size plus eps, which spreads rounding by 1 / eps at most.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4) for model in models]
    sizes = torch.randint(2, 6, (50, 2, 2), generator=torch.Generator().manual_seed(0)).tolist()
    first = copy.deepcopy(models[0].state_dict())
    for step, grids in enumerate(sizes):
        MessageHub.get_current_instance().update_info('iter', step)
        totals = []
        for model, optimizer in zip(models, optimizers, strict=True):
            views = two_views(6, step % 4, grids, seed=step, dtype=torch.float64)
            total, _ = model.parse_losses(model.loss(views))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.detach())
        torch.testing.assert_close(*totals, **CLOSE)
    packed, separate = (model.state_dict() for model in models)
    for k, value in packed.items():
        torch.testing.assert_close(value, separate[k], **CLOSE, msg=k)
    moved = [k for k in packed if not torch.equal(packed[k], first[k])]
    assert any(k.startswith('backbone.layers.3') for k in moved)


@pytest.mark.parametrize('cls_layer', [0, 1])
def test_an_early_cls_takes_part_in_the_token_map_and_leaves_it(cls_layer):
    backbone = dict(BACKBONE, cls_layer=cls_layer)
    config = copy.deepcopy(ALGORITHMS['mocov3'])
    config['algorithm']['backbone'] = backbone
    model = build(config).double()
    views = two_views(2, 3, ((2, 3), (2, 2)), dtype=torch.float64)
    loss = model.loss(views)['loss_ser']
    assert views[0].token_maps[model.backbone].shape == (3, EMBED_DIMS, 2, 3)
    assert gradients(model, loss)['algorithm.backbone.cls_token'].any()


def test_what_the_wrapped_algorithm_reports_is_kept():
    model = build(copy.deepcopy(ALGORITHMS['mocov3']))
    model.algorithm.loss = lambda inputs, data_samples: dict(
        loss_a=torch.tensor(1.0),
        loss_b=[torch.tensor(2.0), torch.tensor(3.0)],
        accuracy=torch.tensor(0.5),
    )
    model._equivariance_loss = lambda views: torch.tensor(10.0)
    model.loss_weight = 2
    total, logged = model.parse_losses(model.loss([]))
    assert total == 26
    assert {k: float(v) for k, v in logged.items()} == dict(
        loss=26, loss_inv=6, inv_a=1, inv_b=5, loss_ser=20, accuracy=0.5
    )


@algorithms
def test_mixed_precision(name):
    """A step in bfloat16: the loss to its 8 bits, and finite gradients.

    Projected tokens are off by some 0.01 of their length, as in the test of the ViT. Logits are off
    by 2 * 0.01 / 0.5 then, and the loss, which is around 4, by twice that, if no errors cancel.
    """
    torch.manual_seed(0)
    model = build(copy.deepcopy(ALGORITHMS[name])).train()
    exact = copy.deepcopy(model).loss(two_views(8, 4))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(two_views(8, 4))
    total, _ = model.parse_losses(losses)
    total.backward()
    torch.testing.assert_close(losses['loss_ser'], exact['loss_ser'], rtol=0.02, atol=0)
    assert losses['loss_ser'].dtype == torch.float32
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@algorithms
def test_without_weight_and_b2_training_is_that_of_the_bare_algorithm(
    name, imagenet_tree, tmp_path
):
    """Bit by bit: momentum branch, running statistics and all, after every one of 8 steps.

    Both runs call the same operations on the same numbers in the same shapes.
    """
    config = copy.deepcopy(ALGORITHMS[name])
    if config['algorithm']['backbone']['type'] == 'SERVisionTransformer':
        config['algorithm']['backbone'] = dict(BACKBONE, drop_path_rate=0.2)  # draws every step
    config['loss_weight'] = 0
    bare = short_run.without_ser(config)
    _, expected = short_run.run(bare, short_run.MULTI_VIEW, imagenet_tree, tmp_path / 'bare')
    views = short_run.equivariant_views(equi_ratio=0)
    _, states = short_run.run(config, views, imagenet_tree, tmp_path / 'ser')
    assert len(states) == len(expected) == 1 + 2 * 4
    for state, other in zip(states, expected, strict=True):
        assert [k for k in state if not k.startswith('ser_neck.')] == list(other)
        assert [k for k in other if not torch.equal(state[k], other[k])] == []
    first, last = states[0], states[-1]
    moved = {k for k in first if not torch.equal(first[k], last[k])}
    assert {k.split('.')[0] for k in moved} >= {'backbone', 'neck'}


@algorithms
def test_without_loss_it_is_the_wrapped_algorithm(name):
    model = build(copy.deepcopy(ALGORITHMS[name])).eval()
    (view, _) = two_views()
    output, expected = model(view.base, mode='tensor'), model.algorithm(view.base, mode='tensor')
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))


def test_layer_depth_is_that_of_the_wrapped_algorithm():
    model = build(copy.deepcopy(ALGORITHMS['mocov3']))
    depths = {k: model.get_layer_depth(k) for k, _ in model.named_parameters()}
    assert depths['algorithm.backbone.patch_embed.projection.weight'] == (0, 6)
    assert depths['algorithm.backbone.layers.2.ln1.weight'] == (3, 6)
    assert depths['ser_neck.layers.1.weight'] == (5, 6)


@algorithms
def test_state_dict_is_that_of_the_wrapped_algorithm_and_ser_neck(name):
    torch.manual_seed(0)
    config = copy.deepcopy(ALGORITHMS[name])
    model, bare = build(config), build(short_run.without_ser(config))
    result = bare.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == {f'ser_neck.{k}' for k in model.ser_neck.state_dict()}
    other = build(config)
    kept = copy.deepcopy(other.ser_neck.state_dict())
    result = other.load_state_dict(bare.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == {f'ser_neck.{k}' for k in kept}
    for k, value in model.state_dict().items():
        same = torch.equal(other.state_dict()[k], value)
        assert same or k.startswith('ser_neck.')
    assert all(torch.equal(other.ser_neck.state_dict()[k], kept[k]) for k in kept)
    other.load_state_dict(model.state_dict(), strict=True)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.load_state_dict(other.state_dict(), strict=True)


@pytest.mark.parametrize('to_rgb', [True, False])
def test_other_pixels_keep_the_order_of_channels(to_rgb):
    """A mean and a std from outside turned RGB into BGR."""
    config = copy.deepcopy(ALGORITHMS['simsiam'])
    config['data_preprocessor'] = dict(mean=[1, 2, 3], std=[4, 5, 6])
    config['algorithm']['data_preprocessor'] = dict(mean=[0] * 3, std=[1] * 3, to_rgb=to_rgb)
    preprocessor = build(config).data_preprocessor
    assert preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert preprocessor._channel_conversion is to_rgb
