"""Heads of EquivarianceAlgorithm: each loss by its formula, in value and gradient; their laws."""

import math

import pytest
import torch

from ser_mm.draws import COLUMNS, places
from ser_mm.models.heads import AugSelfHead, EquiModHead, RotationHead, STLHead
from ser_mm.models.heads.augself_head import differences
from ser_mm.models.heads.contrastive import moco_contrast, nt_xent

N, D = 6, 10
# Of float64: chains of some hundred operations on numbers of about 1, divided by norms, standard
# deviations and temperatures of 0.2, a thousandfold margin above 1e-16 each.
CLOSE = dict(rtol=1e-9, atol=1e-11)


def random(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def features(n=N, seed=0):
    return [random(n, D, seed=seed + i).requires_grad_() for i in range(2)]


def draws(n=N, seed=5):
    rng = torch.Generator().manual_seed(seed)
    table = torch.rand(2, n, len(COLUMNS), generator=rng, dtype=torch.float64)
    binary = places('flip', 'jitter', 'gray', 'blur')
    table[..., binary] = table[..., binary].round()
    return list(table)


# ---- the formulas, with nothing of the package but the weights


def norm_by_batch(x, norm):
    """BatchNorm with the statistics of the batch, or LayerNorm."""
    dim = 1 if isinstance(norm, torch.nn.LayerNorm) else 0
    mean = x.mean(dim, keepdim=True)
    x = (x - mean) / (((x - mean) ** 2).mean(dim, keepdim=True) + norm.eps).sqrt()
    return x if norm.weight is None else x * norm.weight + norm.bias


def layers(x, modules):
    for module in modules:
        if isinstance(module, torch.nn.Linear):
            x = x @ module.weight.t() + (0 if module.bias is None else module.bias)
        elif isinstance(module, torch.nn.ReLU):
            x = x * (x > 0)
        else:
            x = norm_by_batch(x, module)
    return x


def log_softmax_at(logits, place):
    return logits[place] - torch.log(sum(torch.exp(x) for x in logits))


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def nt_xent_of(a, b, temperature):
    rows = [*a, *b]
    total = 0
    for i, row in enumerate(rows):
        partner = (i + len(a)) % len(rows)
        logits = torch.stack([cosine(row, x) / temperature for x in rows])
        others = [j for j in range(len(rows)) if j != i]
        total = total - log_softmax_at(logits[others], others.index(partner))
    return total / len(rows)


def moco_of(a, b, temperature):
    total = 0
    for queries, keys in ((a, b), (b, a)):
        for i, q in enumerate(queries):
            logits = torch.stack([cosine(q, k.detach()) / temperature for k in keys])
            total = total - log_softmax_at(logits, i) / len(queries)
    return 2 * temperature * total


CONTRASTS = dict(nt_xent=nt_xent_of, moco=moco_of)


def augself(head, y, draws, momentum=None):
    labels = []
    for one, other in (draws, draws[::-1]):
        rows = {'crop': [], 'color': [], 'flip': [], 'blur': [], 'solarize': []}
        for a, b in zip(one, other, strict=True):
            a, b = (dict(zip(COLUMNS, x, strict=True)) for x in (a, b))
            centres = []
            for x in (a, b):
                horizontal = x['left'] + x['width'] / 2
                if x['flip'] == 1:
                    horizontal = 1 - horizontal
                centres.append((x['top'] + x['height'] / 2, horizontal))
            rows['crop'].append(
                [
                    centres[0][0] - centres[1][0],
                    centres[0][1] - centres[1][1],
                    a['height'] - b['height'],
                    a['width'] - b['width'],
                ]
            )
            rows['color'].append(
                [a[k] - b[k] for k in ('brightness', 'contrast', 'saturation', 'hue')]
            )
            rows['flip'].append([1.0 if a['flip'] == b['flip'] else 0.0])
            rows['blur'].append([a['sigma'] - b['sigma']])
            rows['solarize'].append([b['solarize'] - a['solarize']])
        labels.append({k: torch.tensor(v, dtype=torch.float64) for k, v in rows.items()})
    of_1, of_2 = momentum or y
    pairs = torch.cat([torch.cat([y[0], of_2], 1), torch.cat([y[1], of_1], 1)])
    total = 0
    for name, weight in head.weights.items():
        target = torch.cat([labels[0][name], labels[1][name]])
        out = layers(pairs, head.predictors[name])
        if name == 'flip':
            p = 1 / (1 + torch.exp(-out))
            error = -(target * p.log() + (1 - target) * (1 - p).log())
        else:
            error = (torch.tanh(out) - target) ** 2
        total = total + weight * error.mean()
    return total


def equimod(head, y, draws, image):
    y0, y1, y2 = layers(torch.cat([image, *y]), head.projector).split(len(image))
    moves = layers(torch.cat(draws), head.transformation)
    predicted = layers(torch.cat([torch.cat([y0, y0]), moves], 1), head.predictor)
    loss = CONTRASTS[head.loss_type](torch.cat([y1, y2]), predicted, head.temperature)
    return loss / 2 if head.loss_type == 'moco' else loss


def stl(head, y, _):
    y1, y2 = y
    t12 = layers(torch.cat([y1, y2], 1), head.encoder)
    t21 = layers(torch.cat([y2, y1], 1), head.encoder)

    def moved(feature, code):
        return (head.matrix.weight @ code).reshape(D, D) @ feature

    partner = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(y1))]
    p1 = torch.stack([moved(y2[i], t21[j]) for i, j in enumerate(partner)])
    p2 = torch.stack([moved(y1[i], t12[j]) for i, j in enumerate(partner)])
    z, p = (torch.cat([layers(x, head.projector) for x in pair]) for pair in ((y1, y2), (p1, p2)))
    even, odd = (
        layers(torch.cat([t12[start::2], t21[start::2]]), head.code_projector) for start in (0, 1)
    )
    contrast = CONTRASTS[head.loss_type]
    return head.equi_weight * contrast(z, p, head.temperature) + head.trans_weight * contrast(
        even, odd, head.temperature
    )


def rotation(head, turned):
    total = 0
    logits = layers(turned, head.classifier)
    for i, row in enumerate(logits):
        total = total - log_softmax_at(row, i // (len(turned) // 4)) / len(turned)
    return total


def compare(head, loss, expected, inputs):
    torch.testing.assert_close(loss, expected, **CLOSE)
    inputs = [*inputs, *head.parameters()]
    grads, others = (
        torch.autograd.grad(x, inputs, allow_unused=True, materialize_grads=True)
        for x in (loss, expected)
    )
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, **CLOSE)
    assert all(grad.any() for grad in grads)


@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
def test_augself_equals_its_formula(norm):
    torch.manual_seed(0)
    weights = dict(crop=0.5, color=0.7, flip=0.2, blur=0.3, solarize=0.1)
    head = AugSelfHead(D, weights, hid_channels=12, norm_cfg=dict(type=norm)).double()
    y, table = features(), draws()
    result = head.loss(y, table)
    compare(head, result['loss'], augself(head, y, table), y)
    assert {k for k in result if k != 'loss'} == {f'{name}_error' for name in weights}


def test_augself_with_the_other_view_of_the_momentum_branch():
    torch.manual_seed(0)
    head = AugSelfHead(D, hid_channels=12, other='momentum').double()
    y, table, kept = features(), draws(), [random(N, D, seed=20 + i) for i in range(2)]
    loss = head.loss(y, table, momentum=kept)['loss']
    compare(head, loss, augself(head, y, table, kept), y)


@pytest.mark.parametrize('loss', ['nt_xent', 'moco'])
def test_equimod_equals_its_formula(loss):
    torch.manual_seed(0)
    head = EquiModHead(D, hid_channels=12, out_channels=8, loss=loss).double()
    y, table, image = features(), draws(), random(N, D, seed=9).requires_grad_()
    result = head.loss(y, table, extra=[image])
    compare(head, result['loss'], equimod(head, y, table, image), [*y, image])


@pytest.mark.parametrize('loss', ['nt_xent', 'moco'])
def test_stl_equals_its_formula(loss):
    torch.manual_seed(0)
    sizes = dict(code_channels=7, hid_channels=12, out_channels=8)
    head = STLHead(D, **sizes, trans_weight=0.3, loss=loss).double()
    y = features()
    compare(head, head.loss(y)['loss'], stl(head, y, None), y)


def test_rotation_equals_its_formula():
    torch.manual_seed(0)
    head = RotationHead(D, hid_channels=9).double()
    turned = random(4 * N, D).requires_grad_()
    result = head.loss([], extra=[turned])
    compare(head, result['loss'], rotation(head, turned), [turned])


def test_a_crop_is_turned_in_all_four_ways():
    crops = random(3, 3, 4, 4)
    (turned,) = RotationHead(D).prepare([crops])
    for k, images in enumerate(turned.split(3)):
        assert torch.equal(images, torch.rot90(crops, k, (2, 3)))


def test_crops_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match='extra_views makes images of 4 x 6; .* square'):
        RotationHead(D).prepare([random(3, 3, 4, 6)])


def test_rotation_that_is_told_the_answer_is_right():
    head = RotationHead(D)
    head.classifier = torch.nn.Identity()
    turned = 100 * torch.eye(4).repeat_interleave(3, dim=0)
    result = head.loss([], extra=[turned])
    assert result['rotation_accuracy'] == 1 and result['loss'] < 1e-6
    assert head.loss([], extra=[turned.roll(3, 0)])['rotation_accuracy'] == 0


def test_equal_draws_give_labels_of_zero_and_a_swap_negates_them():
    one, other = draws()
    zero = differences(one, one)
    assert not any(zero[name].any() for name in zero if name != 'flip')
    assert (zero['flip'] == 1).all()
    there, back = differences(one, other), differences(other, one)
    for name in there:
        assert torch.equal(there[name], back[name] if name == 'flip' else -back[name])
        assert there[name].any()


def test_flipping_both_views_negates_the_horizontal_difference_alone():
    one, other = draws()
    flipped = [x.clone() for x in (one, other)]
    for x in flipped:
        x[:, places('flip')] = 1 - x[:, places('flip')]
    before, after = differences(one, other), differences(*flipped)
    sign = torch.tensor([1, -1, 1, 1])
    torch.testing.assert_close(after['crop'], sign * before['crop'], rtol=0, atol=1e-15)
    for name in ('color', 'flip', 'blur', 'solarize'):
        assert torch.equal(before[name], after[name])


def test_labels_of_a_crop_made_by_hand():
    """The upper left quarter, mirrored, against the whole image."""
    one, other = torch.zeros(2, 1, len(COLUMNS))
    one[:, places('height', 'width')] = 0.5
    one[:, places('flip')] = 1
    other[:, places('height', 'width')] = 1
    assert differences(one, other)['crop'].tolist() == [[-0.25, 0.25, -0.5, -0.5]]


def test_start_values():
    """What random embeddings cost: the logarithm of the number of choices.

    Cosines of random vectors in 4,096 dimensions are within 5 / 64 with probability 1 - 1e-6, each;
    divided by a temperature of 100, they change the loss by 2 * 5 / 64 / 100 at most.
    """
    a, b = random(64, 4096), random(64, 4096, seed=1)
    assert nt_xent(a, b, 100.0).item() == pytest.approx(math.log(127), abs=2e-3)
    assert moco_contrast(a, b, 100.0).item() == pytest.approx(400 * math.log(64), abs=400 * 2e-3)
    head = RotationHead(D).double()
    torch.nn.init.zeros_(head.classifier[-1].weight)
    torch.nn.init.zeros_(head.classifier[-1].bias)
    assert head.loss([], extra=[random(8, D)])['loss'].item() == pytest.approx(math.log(4))


def test_figures_at_their_floors():
    """An AugSelf that predicts 0, predictions of EquiMod and STL that only copy."""
    head = AugSelfHead(D, dict(crop=1, color=1, flip=1, blur=1, solarize=1)).double()
    for predictor in head.predictors.values():
        torch.nn.init.zeros_(predictor[-1].weight)
        torch.nn.init.zeros_(predictor[-1].bias)
    result = head.loss(features(), draws())
    assert all(v.item() == pytest.approx(1) for k, v in result.items() if k.endswith('_error'))
    head = EquiModHead(D, hid_channels=12, out_channels=8).double()
    image = random(N, D, seed=9)
    head.predictor = torch.nn.Identity()
    head.transformation = torch.nn.Linear(len(COLUMNS), 0).double()
    assert head.loss([image, image], draws(), extra=[image])['equimod_gain'].abs() < 1e-6


def test_wrong_arguments_are_named():
    for make, name in [
        (lambda: AugSelfHead(D, dict(crop=1, rotation=1)), 'rotation'),
        (lambda: AugSelfHead(D, other='target'), 'other='),
        (lambda: EquiModHead(D, loss='mse'), 'loss='),
        (lambda: STLHead(D, loss='mse'), 'loss='),
    ]:
        with pytest.raises(ValueError, match=name):
            make()
    with pytest.raises(ValueError, match='batch of 5 .* even batch_size'):
        STLHead(D).double().loss(features(5))
    head = AugSelfHead(D, other='momentum').double()
    with pytest.raises(ValueError, match="no momentum branch; set other='online'"):
        head.loss(features(), draws())
