"""SERAlgorithm fills in what the backbone and the wrapped algorithm know."""

import copy
import warnings

import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmpretrain.models import SelfSupDataPreprocessor
from mmpretrain.registry import MODELS, TRANSFORMS

from ser_mm.models import SERDataPreprocessor, SERHead, SERNeck
from tests.support import short_run
from tests.support.algorithms import (
    ALGORITHMS,
    BACKBONE,
    EMBED_DIMS,
    PATCH,
    PIXELS,
    RESNET,
    build,
    mlp,
    simsiam,
    two_views,
    with_ser,
)


def alone(backbone=BACKBONE, projector=None, **options):
    """Nothing but the algorithm, whose preprocessor is MMPretrain's."""
    pixels = dict(type='SelfSupDataPreprocessor', **PIXELS)
    algorithm = dict(simsiam(backbone, projector or mlp(EMBED_DIMS)), data_preprocessor=pixels)
    return dict(type='SERAlgorithm', algorithm=algorithm, **options)


def test_an_algorithm_is_enough():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = build(alone())
    assert isinstance(model.ser_neck, SERNeck) and model.ser_neck.in_channels == EMBED_DIMS
    assert isinstance(model.ser_head, SERHead) and model.ser_head.temperature == 0.5
    preprocessor = model.data_preprocessor
    assert type(preprocessor) is SERDataPreprocessor and preprocessor.patch_size == PATCH
    assert preprocessor.mean.flatten().tolist() == pytest.approx(PIXELS['mean'])
    assert preprocessor.std.flatten().tolist() == pytest.approx(PIXELS['std'])
    assert preprocessor._channel_conversion
    losses = model.loss(two_views(), [None] * 9)
    assert losses['loss_ser'] > 0 and losses['loss_ser'].requires_grad


def test_each_stage_of_a_resnet_has_its_width_and_stride():
    for stage, (channels, stride) in {1: (24, 4), 2: (48, 8), 4: (192, 32)}.items():
        model = build(alone(dict(RESNET, ser_layer=stage), mlp(192, with_avg_pool=True)))
        assert model.ser_neck.in_channels == channels
        assert model.data_preprocessor.patch_size == stride


def test_numbers_are_those_of_the_explicit_config():
    """Same weights, losses and random state as with everything spelled out."""
    options = dict(neck=dict(hid_channels=40, out_channels=24))
    found = []
    for config in (
        alone(**options),
        with_ser(simsiam(BACKBONE, mlp(EMBED_DIMS)), head=dict(type='SERHead', temperature=0.5)),
    ):
        torch.manual_seed(0)
        model = build(config)
        losses = model.loss(two_views(), [None] * 9)
        found.append((losses['loss_inv'], losses['loss_ser'], torch.rand(3)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def batch():
    init_default_scope('mmpretrain')
    load = [
        TRANSFORMS.build(x) for x in (short_run.equivariant_views(0.5), dict(type='PackInputs'))
    ]
    data = [dict(img=torch.randint(256, (40, 40, 3)).byte().numpy()) for _ in range(4)]
    load[0].in_b2 = True
    for transform in load:
        data = [transform(x) for x in data]
    return default_collate(data)


@pytest.mark.parametrize('place', ['algorithm', 'Runner', 'type by class', 'with scope'])
def test_mean_and_std_come_from_wherever_they_are(place):
    """The Runner sets a model's data_preprocessor to that at the top level of its config."""
    pixels = dict(type='SelfSupDataPreprocessor', **PIXELS)
    config = alone()
    if place != 'algorithm':
        config['algorithm'].pop('data_preprocessor')
        config['data_preprocessor'] = pixels
    if place == 'type by class':
        pixels['type'] = SelfSupDataPreprocessor
    if place == 'with scope':
        pixels |= dict(type='mmpretrain.SelfSupDataPreprocessor', _scope_='mmpretrain')
    model = build(config)
    explicit = build(with_ser(simsiam(BACKBONE, mlp(EMBED_DIMS))))
    data = batch()
    for a, b in zip(
        *(m.data_preprocessor(copy.deepcopy(data))['inputs'] for m in (model, explicit)),
        strict=True,
    ):
        assert torch.equal(a.base, b.base)


def test_explicit_values_win():
    model = build(
        alone(
            neck=dict(type='SERNeck', in_channels=EMBED_DIMS, hid_channels=8),
            head=dict(temperature=0.2),
            data_preprocessor=dict(mean=[1.0, 2, 3], std=[4.0, 5, 6], scale=(1, 1)),
        )
    )
    assert model.ser_neck.layers[1].out_features == 8 and model.ser_head.temperature == 0.2
    assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert model.data_preprocessor.std.flatten().tolist() == [4, 5, 6]
    # The order of channels is not a matter of its mean and std: it stays the wrapped algorithm's.
    assert model.data_preprocessor._channel_conversion
    assert model.data_preprocessor.scale == (1, 1)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(neck=dict(in_channels=50)), 'neck.in_channels=50, .* set neck.in_channels=48'),
        (dict(data_preprocessor=dict(mean=[1, 2, 3])), 'has a mean without a std; set both'),
        (dict(data_preprocessor=dict(patch_size=16)), 'patch_size=16.* patch_size=8'),
        (
            dict(
                data_preprocessor=dict(
                    type='TwoNormDataPreprocessor', second_mean=[0, 0, 0], second_std=[1, 1, 1]
                )
            ),
            'type=TwoNormDataPreprocessor does not split views',
        ),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(alone(**options))


def test_without_mean_it_says_so():
    config = alone()
    config['algorithm'].pop('data_preprocessor')
    with pytest.warns(UserWarning, match='neither data_preprocessor nor the wrapped algorithm'):
        build(config)


@pytest.mark.parametrize('name', ALGORITHMS)
def test_features_are_those_of_the_backbone(name):
    model = MODELS.build(copy.deepcopy(ALGORITHMS[name])).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found, expected = model.extract_feat(images), model.backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
