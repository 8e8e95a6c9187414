"""Which algorithms SER wraps, and what it says of the others."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmpretrain.models import LatentCrossCorrelationHead
from mmpretrain.registry import MODELS
from torch import nn

from ser_mm.models import CrossCorrelationHead
from tests.support.algorithms import (
    ALGORITHMS,
    BACKBONE,
    EMBED_DIMS,
    IMAGE,
    barlowtwins,
    build,
    mlp,
    simsiam,
    two_views,
    with_ser,
)
from tests.support.paths import ROOT
from tests.support.two_ranks import on_two_ranks

# Of float64, as in test_ser_algorithm; gradients are around 1e-3.
CLOSE = dict(rtol=1e-8, atol=1e-10)


@MODELS.register_module(force=True)
class OwnAlgorithm(BaseModel):
    """Someone's own: a regression of one view on the other, under a schedule of its own."""

    momentum = False

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        if self.momentum:
            self.slow = copy.deepcopy(self.backbone).requires_grad_(False)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.loss(inputs, data_samples) if mode == 'loss' else self.backbone(inputs)

    def targets(self, view):
        return self.slow(view)[-1] if self.momentum else self.backbone_of(view).detach()

    def backbone_of(self, view):
        return self.backbone(view)[-1]

    def loss(self, inputs, data_samples=None):
        hub = MessageHub.get_current_instance()
        assert len(data_samples) == len(inputs[0])
        weight = 1 - hub.get_info('iter') / hub.get_info('max_iters')
        a, b = (self.backbone_of(view) for view in inputs[:2])
        if self.momentum:
            a, b = a - self.targets(inputs[1]), b - self.targets(inputs[0])
            return dict(loss_own=weight * (a.square().mean() + b.square().mean()))
        return dict(loss_own=weight * (a - b).square().mean(), spread=a.std().detach())


@MODELS.register_module(force=True)
class OwnMomentumAlgorithm(OwnAlgorithm):
    momentum = True


@MODELS.register_module(force=True)
class TwiceAlgorithm(OwnAlgorithm):
    def backbone_of(self, view):
        return self.backbone(view)[-1] + self.backbone(view)[-1]


@MODELS.register_module(force=True)
class OneSidedAlgorithm(OwnAlgorithm):
    def loss(self, inputs, data_samples=None):
        return dict(loss=self.backbone(inputs[0])[-1].mean())


@MODELS.register_module(force=True)
class StackingAlgorithm(OwnAlgorithm):
    def loss(self, inputs, data_samples=None):
        return dict(loss=self.backbone(torch.cat(inputs))[-1].mean())


@MODELS.register_module(force=True)
class ThreeBranchAlgorithm(OwnMomentumAlgorithm):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.third = copy.deepcopy(self.slow)

    def targets(self, view):
        return super().targets(view) + self.third(view)[-1]


class Dropping(nn.Module):
    token_map_channels, token_map_stride = EMBED_DIMS, 8


@MODELS.register_module(force=True)
class FewEmbeddings(Dropping):
    """A backbone that forgets b2's embeddings."""

    def forward(self, x):
        x.token_maps[self] = x.equi.new_zeros(len(x.equi), 48, *(s // 8 for s in x.equi.shape[2:]))
        return (x.base.mean(dim=(2, 3)),)


@MODELS.register_module(force=True)
class WrongMap(Dropping):
    """A backbone whose token map has another stride than it tells."""

    def forward(self, x):
        x.token_maps[self] = x.equi.mean(1, keepdim=True).expand(-1, 48, -1, -1)
        return (torch.cat([x.base.mean(dim=(2, 3)), x.equi.mean(dim=(2, 3))]),)


@MODELS.register_module(force=True)
class BareTensor(WrongMap):
    def forward(self, x):
        return super().forward(x)[-1]


@MODELS.register_module(force=True)
class NeverEmpty(Dropping):
    """A backbone that computes on b2 what an empty batch does not have."""

    def forward(self, x):
        maps = nn.functional.avg_pool2d(x.equi, 8).mean(1, keepdim=True).expand(-1, 48, -1, -1)
        x.token_maps[self] = maps - maps.amax()
        return (torch.cat([x.base.mean(dim=(2, 3)), x.equi.mean(dim=(2, 3))]),)


@MODELS.register_module(force=True)
class DetachedMap(Dropping):
    """A backbone whose token map carries no gradient."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, EMBED_DIMS, 8, 8)

    def forward(self, x):
        maps = self.stem(x.equi)
        x.token_maps[self] = maps.detach()
        return (torch.cat([y.mean(dim=(2, 3)) for y in (self.stem(x.base), maps)]),)


@MODELS.register_module(force=True)
class StrideOfTwo(DetachedMap):
    token_map_stride = (8, 8)


@MODELS.register_module(force=True)
class Returning(OwnAlgorithm):
    """Someone's own, whose loss returns something else."""

    def __init__(self, backbone, what):
        super().__init__(backbone)
        self.what = what

    def loss(self, inputs, data_samples=None):
        a, b = (self.backbone_of(view) for view in inputs[:2])
        total = (a - b).square().mean()
        return {
            'tensor': total,
            'float': dict(loss=total.item()),
            'none': dict(loss=None),
            'other name': dict(total=total),
            'nothing': {},
            'detached': dict(loss=total.detach()),
            'parts': dict(loss_a=total, loss_b=[total, 2 * total], spread=a.std().detach()),
        }[self.what]


RETURNED = {
    'tensor': 'its loss returns a Tensor, not a dict',
    'float': "its loss returns a float as 'loss', no tensor",
    'none': "its loss returns a NoneType as 'loss', no tensor",
    'other name': r"its loss returns \['total'\], none with 'loss' in its name",
    'nothing': r'its loss returns \[\], none with',
    'detached': r"no gradient comes from \['loss'\]",
}


def own(kind, backbone=BACKBONE):
    return with_ser(dict(type=kind, backbone=backbone))


@pytest.mark.parametrize('kind', ['OwnAlgorithm', 'OwnMomentumAlgorithm'])
def test_an_algorithm_of_ones_own_plugs_in(kind):
    model = build(own(kind))
    views = two_views()
    losses = model(views, [None] * 9, mode='loss')
    alone = model.algorithm.loss(views, [None] * 9)
    assert torch.equal(losses['loss_inv'], alone['loss_own'])  # by the same operations
    assert losses.keys() - {'spread'} == {'loss_inv', 'loss_ser'}
    losses['loss_ser'].backward()
    early = [p for name, p in model.backbone.named_parameters() if name.startswith('layers.1.')]
    assert all(p.grad.abs().max() > 0 for p in [*early, *model.ser_neck.parameters()])
    late = [p for name, p in model.backbone.named_parameters() if name.startswith('layers.2.')]
    assert all(p.grad is None or not p.grad.any() for p in late)


def test_the_backbone_of_the_guide_plugs_in():
    guide = (ROOT / 'docs/howto/own_algorithm.md').read_text()
    code = next(x for x in re.findall('```python\n(.*?)```', guide, re.S) if 'MyBackbone' in x)
    exec(code.replace('register_module()', 'register_module(force=True)'), {})
    algorithm = simsiam(dict(type='MyBackbone'), mlp(128))
    model = build(dict(type='SERAlgorithm', algorithm=algorithm))
    losses = model.loss(two_views(), [None] * 9)
    losses['loss_ser'].backward()
    assert model.backbone.early[0].weight.grad.abs().max() > 0
    assert model.backbone(torch.rand(2, 3, 48, 32))[-1].shape == (2, 128)


PREDICT = dict(type='LatentPredictHead', predictor=mlp(), loss=dict(type='CosineSimilarityLoss'))
CONTRAST = dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss'))
MAE = dict(
    type='MAE',
    backbone=dict(type='MAEViT', arch='b', img_size=32),
    neck=dict(type='MAEPretrainDecoder', embed_dim=768, decoder_depth=1),
    head=dict(
        type='MAEPretrainHead',
        patch_size=16,
        loss=dict(type='PixelReconstructionLoss', criterion='L2'),
    ),
)
SWAV = dict(
    type='SwAV',
    backbone=BACKBONE,
    neck=dict(
        type='SwAVNeck',
        in_channels=48,
        hid_channels=64,
        out_channels=32,
        with_avg_pool=False,
        norm_cfg=dict(type='BN1d'),
    ),
    head=dict(
        type='SwAVHead',
        loss=dict(type='SwAVLoss', feat_dim=32, num_crops=[2], num_prototypes=10),
    ),
)
REFUSED = {
    'SimCLR': (
        dict(type='SimCLR', backbone=BACKBONE, neck=mlp(EMBED_DIMS), head=CONTRAST),
        '`stack` cannot take a view, for it holds b1 and b2, which differ in size',
    ),
    'SwAV': (SWAV, 'a view has no `shape`, for it holds b1 and b2, which differ in size'),
    'MAE': (MAE, 'gives `backbone` a list instead of one whole view'),
    'MAE on our ViT': (
        dict(MAE, backbone=BACKBONE),
        'gives `backbone` a list instead of one whole view',
    ),
    'MoCo': (
        dict(
            type='MoCo',
            queue_len=64,
            feat_dim=32,
            backbone=BACKBONE,
            neck=mlp(EMBED_DIMS),
            head=CONTRAST,
        ),
        'a view has no `shape`',
    ),
    'stacking': (dict(type='StackingAlgorithm', backbone=BACKBONE), '`cat` cannot take a view'),
    'twice': (dict(type='TwiceAlgorithm', backbone=BACKBONE), 'to `backbone` 2 times'),
    'one view': (dict(type='OneSidedAlgorithm', backbone=BACKBONE), 'to `backbone` 0 times'),
    'three branches': (
        dict(type='ThreeBranchAlgorithm', backbone=BACKBONE),
        'at most one momentum branch',
    ),
    'few embeddings': (
        dict(type='OwnAlgorithm', backbone=dict(type='FewEmbeddings')),
        '4 images have 2 embeddings',
    ),
    'wrong map': (
        dict(type='OwnAlgorithm', backbone=dict(type='WrongMap')),
        r'token map has the shape \(2, 48, 32, 24\) instead of \(2, 48, 4, 3\)',
    ),
    'neck that does not fit': (simsiam(BACKBONE, mlp(40)), 'mat1 and mat2 shapes'),
    'plain backbone': (
        simsiam(dict(type='VisionTransformer', arch='deit-tiny', img_size=32), mlp(192)),
        'gives no token map; use .*; one that you wrote has to tell token_map_channels and',
    ),
    'no ser_layer': (
        simsiam(dict(BACKBONE, ser_layer=None), mlp(48)),
        'gives no token map; backbone.ser_layer=None, set it to 3',
    ),
    'ResNet': (
        simsiam(dict(type='ResNet', depth=18), mlp(512, with_avg_pool=True)),
        "ResNet, gives no token map; use type='SERResNet' with ser_layer=3",
    ),
    'SER in SER': (ALGORITHMS['simsiam'], 'algorithm=SERAlgorithm wraps one already'),
    'tensor of embeddings': (
        dict(type='OwnAlgorithm', backbone=dict(type='BareTensor')),
        '`backbone` returns a Tensor, not a tuple of embeddings',
    ),
    'no gradient to the token map': (
        dict(type='OwnAlgorithm', backbone=dict(type='DetachedMap')),
        'token map of `backbone` carries no gradient',
    ),
    'frozen up to the token map': (
        dict(type='OwnAlgorithm', backbone=dict(BACKBONE, frozen_stages=BACKBONE['ser_layer'])),
        'freeze no stages up to it',
    ),
    'stride of two numbers': (
        dict(type='OwnAlgorithm', backbone=dict(type='StrideOfTwo')),
        r'token_map_stride of the backbone, StrideOfTwo, is \(8, 8\); set it to an integer',
    ),
    'b2 never empty': (
        dict(type='OwnAlgorithm', backbone=dict(type='NeverEmpty')),
        'in a trial step without images in b2, ',
    ),
    **{
        f'loss returns {what}': (dict(type='Returning', backbone=BACKBONE, what=what), why)
        for what, why in RETURNED.items()
    },
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_work_is_refused_at_build_in_one_sentence(name):
    algorithm, why = REFUSED[name]
    with pytest.raises(ValueError, match=why) as error:
        MODELS.build(with_ser(algorithm))
    message = str(error.value)
    assert message.startswith('SERAlgorithm: ') and algorithm['type'] in message
    assert message.endswith('.') and '\n' not in message and '. ' not in message


def test_parts_of_a_loss_stay_in_the_log_and_count_once():
    model = build(with_ser(dict(type='Returning', backbone=BACKBONE, what='parts')))
    losses = model.loss(two_views(), [None] * 9)
    assert set(losses) == {'loss_inv', 'loss_ser', 'spread', 'inv_a', 'inv_b'}
    total, logged = model.parse_losses(losses)
    assert torch.equal(total, losses['loss_inv'] + losses['loss_ser'])
    torch.testing.assert_close(logged['inv_a'] + logged['inv_b'], losses['loss_inv'])
    assert not logged['inv_a'].requires_grad


NECKS = {
    'another neck': (dict(neck=mlp(EMBED_DIMS)), 'neck.type=NonLinearNeck does not do'),
    'pyramid': (dict(neck=dict(type='SimpleFPN')), 'neck.type=SimpleFPN does not do'),
    'another head': (dict(head=dict(type='DINOHead')), 'head.type=DINOHead does not do'),
    'a neck for a head': (
        dict(head=dict(type='SERNeck', in_channels=48)),
        'head.type=SERNeck does not do .* leave it out for SERHead',
    ),
}


@pytest.mark.parametrize('name', NECKS)
def test_projector_and_loss_of_another_kind(name):
    options, why = NECKS[name]
    with pytest.raises(ValueError, match=why) as error:
        MODELS.build(with_ser(simsiam(BACKBONE, mlp(EMBED_DIMS)), **options))
    message = str(error.value)
    assert message.endswith('.') and '\n' not in message


@pytest.mark.parametrize('name', ['mocov3', 'dino'])
def test_a_third_view_has_to_be_seen(name):
    model = build(ALGORITHMS[name])
    views = [*two_views(), torch.randn(9, 3, 16, 16), torch.randn(9, 3, 16, 16)]
    if name == 'dino':  # local crops
        losses = [model.loss(views, [None] * 9) for _ in range(2)]
        assert all(type(x) is torch.Tensor for x in losses[0].values())
        assert losses[0].keys() == losses[1].keys()
    else:
        with pytest.raises(ValueError, match='views=4 .*algorithm=MoCoV3.* number 3; give'):
            model.loss(views, [None] * 9)


def test_batch_of_one_image():
    model = build(ALGORITHMS['simsiam'])  # its projector has BatchNorm
    with pytest.raises(
        ValueError, match=r'batch of 1 images in b1 and 0 .* train_dataloader\.batch_size'
    ):
        model.loss(two_views(n1=1, n2=0), [None])
    without = build(own('OwnMomentumAlgorithm'))
    assert without.loss(two_views(n1=1, n2=0), [None])['loss_inv'].isfinite()


@pytest.mark.parametrize('name', ['byol', 'barlowtwins_resnet'])
def test_trial_leaves_no_trace(name, monkeypatch):
    """Same weights, buffers, random numbers and message hub as without it."""
    hub = MessageHub.get_current_instance()

    def built():
        monkeypatch.setattr(hub, '_runtime_info', dict(iter=7))
        torch.manual_seed(0)
        model = MODELS.build(ALGORITHMS[name])
        return model.state_dict(), torch.rand(3), hub.runtime_info

    with_trial = built()
    monkeypatch.setattr('ser_mm.models.two_view_wrapper.try_views', lambda *args: None)
    without = built()
    assert with_trial[0].keys() == without[0].keys()
    assert all(torch.equal(with_trial[0][key], without[0][key]) for key in without[0])
    assert torch.equal(with_trial[1], without[1])
    assert with_trial[2] == without[2] == dict(iter=7)


def test_in_a_process_group_the_first_step_says_why(tmp_path):
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = build(with_ser(REFUSED['SimCLR'][0]))
        with pytest.raises(TypeError, match='`stack` cannot take a view, for it holds b1 and b2'):
            model.loss(two_views(), [None] * 9)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('base', [simsiam, barlowtwins])
def test_gradient_to_online_keys_is_a_choice(base):
    """Through both sides by default; with detach_keys, as if the keys were given numbers."""
    gradients, losses = {}, {}
    for detach_keys in (False, True):
        torch.manual_seed(0)
        model = build(with_ser(base(BACKBONE, mlp(EMBED_DIMS)), detach_keys=detach_keys))
        given = []
        compute = model.ser_head.loss

        def spy(queries, keys, compute=compute, given=given):
            given.append(keys)
            return compute(queries, keys)

        model.ser_head.loss = spy
        losses[detach_keys] = model.loss(two_views(), [None] * 9)['loss_ser']
        assert all(key.requires_grad != detach_keys for key in given[0])
        weights = [model.ser_neck.layers[1].weight, model.backbone.layers[0].attn.qkv.weight]
        gradients[detach_keys] = torch.autograd.grad(losses[detach_keys], weights)
    assert torch.equal(losses[False], losses[True])  # by the same operations
    for both, one in zip(gradients[False], gradients[True], strict=True):
        assert both.abs().max() > 0 and (both - one).abs().max() > 0.1 * both.abs().max()


def ser_gradients(rank, detach_keys):
    """Of the SER loss, by one process or as DDP averages them over two."""
    torch.manual_seed(0)
    model = build(with_ser(simsiam(BACKBONE, mlp(EMBED_DIMS)), detach_keys=detach_keys)).double()
    views = two_views(n1=4, n2=3, dtype=torch.float64)
    if rank is not None:
        model = MMDistributedDataParallel(model, find_unused_parameters=True)
        for view in views:  # two images of b2 here, one there
            view.base = view.base[2 * rank : 2 * rank + 2]
            own = slice(0, 2) if rank == 0 else slice(2, 3)
            view.equi, view.elements = view.equi[own], view.elements[own]
    model(views, [None] * len(views[0]), mode='loss')['loss_ser'].backward()
    names = 'ser_neck.layers.1.weight', 'backbone.layers.0.attn.qkv.weight'
    return [p.grad for name, p in model.named_parameters() if name.endswith(names)]


def ser_gradients_both(rank=None):
    return [ser_gradients(rank, detach_keys) for detach_keys in (False, True)]


@pytest.mark.slow
def test_online_keys_of_other_ranks_count_as_ones_own():
    one, ranks = ser_gradients_both(), on_two_ranks(ser_gradients_both)
    for rank in ranks:
        for detach_keys in (False, True):
            assert len(one[detach_keys]) == 2
            for grad, expected in zip(rank[detach_keys], one[detach_keys], strict=True):
                assert expected.abs().max() > 0
                torch.testing.assert_close(grad, expected, **CLOSE)


def correlation(rank=None):
    """Loss and gradient of Barlow Twins' head, with given statistics, over 6 images."""
    head = CrossCorrelationHead(5, dict(type='CrossCorrelationLoss')).double().eval()
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    own = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    loss = head.loss(*(scale * x[:, own]))
    (grad,) = torch.autograd.grad(loss, scale)
    return loss.detach(), grad


@pytest.mark.slow
def test_cross_correlation_does_not_depend_on_the_number_of_ranks():
    loss, grad = correlation()
    (loss_0, grad_0), (loss_1, grad_1) = on_two_ranks(correlation)
    for value, expected in (
        (loss_0, loss),
        (loss_1, loss),
        ((grad_0 + grad_1) / 2, grad),  # the mean, which DDP takes
    ):
        torch.testing.assert_close(value, expected, **CLOSE)


def test_cross_correlation_is_that_of_mmpretrain_on_one_process():
    options = dict(in_channels=5, loss=dict(type='CrossCorrelationLoss', lambd=0.0051))
    x = torch.randn(2, 6, 5)
    expected = LatentCrossCorrelationHead(**options).double().loss(*x.double())
    head = CrossCorrelationHead(**options)
    torch.testing.assert_close(copy.deepcopy(head).double().loss(*x.double()), expected, **CLOSE)
    with torch.autocast('cpu', torch.bfloat16):
        low = head.loss(*x.bfloat16())
    assert low.dtype == torch.float32


def test_views_are_handed_on_whole():
    """What the trial relies on: nothing but a backbone gets anything out of a view."""
    (view, other) = two_views()
    assert len(view) == 9
    for use in (
        lambda: torch.cat([view, other]),
        lambda: nn.functional.conv2d(view, torch.ones(1, 3, 1, 1)),
        lambda: torch.add(view, 1),
    ):
        with pytest.raises(TypeError, match='cannot take a view'):
            use()
    with pytest.raises(AttributeError, match='a view has no `device`'):
        view.device  # noqa: B018
    assert copy.deepcopy(view).base.shape == (6, 3, IMAGE, IMAGE)
