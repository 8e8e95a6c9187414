"""Whole views by SERDataPreprocessor: b1 and b2, what they share, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from scipy.stats import chisquare

from ser_mm.geometry import act_on_array
from ser_mm.models import SERDataPreprocessor
from ser_mm.models.device_views import _KERNELS, DeviceView, resized_crop
from ser_mm.views import ViewBatch, count_b2, count_b2_of_rank
from tests.support.device_views import (
    CROP,
    FLIP,
    JITTER,
    LEVEL,
    PIXELS,
    SIZE,
    VIEWS,
    make,
    pieces,
    preprocessor,
    to_batch,
)


@pytest.fixture(scope='module')
def images():
    return pieces()


def undo(images, elements):
    """Images of b2 as they were before they were moved."""
    inverse = [
        next(
            k
            for k in range(8)
            if np.array_equal(act_on_array(act_on_array(PROBE, element), k), PROBE)
        )
        for element in elements.tolist()
    ]
    arrays = images.permute(0, 2, 3, 1).numpy()
    return np.stack([act_on_array(x, k) for x, k in zip(arrays, inverse, strict=True)])


PROBE = np.arange(9).reshape(3, 3)


def test_b2_shares_its_crop_and_is_moved_by_the_elements_that_it_tells(images):
    views = [[CROP, FLIP], [CROP, dict(FLIP, prob=1.0)]]
    fixed = dict(scale=(1, 1), aspect_ratio=(1, 1))  # no resize
    pair = make(images, views=views, equi_ratio=0.5, **fixed)
    assert [(len(view.base), len(view.equi)) for view in pair] == [(32, 32)] * 2
    restored = [undo(view.equi, view.elements) for view in pair]
    np.testing.assert_array_equal(*restored)
    assert np.abs(restored[0][:, :, ::-1] - restored[1]).max() > 1  # flips would be seen
    assert not torch.equal(pair[0].elements, pair[1].elements)
    # Each image is in b1 or in b2, b1 in its order: of crops of all, the images can be told.
    whole = [[dict(CROP, crop_ratio_range=(1, 1), aspect_ratio_range=(1, 1), scale=SIZE)]] * 2
    pair = make(images, views=whole, equi_ratio=0.25, **fixed)
    batch = to_batch(images).flip(1).float()
    found = torch.cat(
        [pair[0].base, torch.from_numpy(undo(pair[1].equi, pair[1].elements)).permute(0, 3, 1, 2)]
    )
    places = torch.cdist(found.flatten(1), batch.flatten(1)).argmin(1).tolist()
    assert sorted(places) == list(range(64))
    assert places[:48] == sorted(places[:48]) and places[48:] != list(range(48, 64))


def test_elements_are_uniform(images):
    small = [[dict(CROP, scale=8)]] * 2
    drawn = [make(images, seed, views=small, equi_ratio=1) for seed in range(12)]
    for v in range(2):
        counts = torch.cat([views[v].elements for views in drawn]).bincount(minlength=8)
        assert chisquare(counts.numpy()).pvalue > LEVEL
    pairs = torch.cat([8 * a.elements + b.elements for a, b in drawn])
    assert chisquare(pairs.bincount(minlength=64).numpy()).pvalue > LEVEL


def test_without_b2_the_views_are_those_of_the_baseline(images):
    local = [dict(CROP, scale=16, crop_ratio_range=(0.05, 0.25)), JITTER, FLIP]
    views = [*VIEWS, local, local]
    plain = make(images, views=views)
    for view, other in zip(plain, make(images, views=views, equi_ratio=0), strict=True):
        other = other.base if isinstance(other, ViewBatch) else other
        assert torch.equal(view, other)
    assert [tuple(view.shape[-2:]) for view in plain] == [(32, 32)] * 2 + [(16, 16)] * 2
    split = make(images, views=views, equi_ratio=1 / 16)
    assert [type(view) for view in split] == [ViewBatch] * 2 + [torch.Tensor] * 2
    assert [len(view) for view in split] == [64] * 4


def test_draws_are_of_the_seed_and_apart(images):
    same = np.repeat(images[:1], 24, axis=0)
    first, again, other = (make(same, seed, equi_ratio=0.25) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.base, b.base) and torch.equal(a.equi, b.equi)
        assert not torch.equal(a.base, c.base)
    crops = torch.cat([view.base for view in make(same, views=[[CROP, FLIP]] * 2, equi_ratio=0)])
    assert len(crops.flatten(1).unique(dim=0)) == 48


def test_samples_follow_their_images(images):
    torch.manual_seed(0)
    whole = [[dict(CROP, crop_ratio_range=(1, 1), aspect_ratio_range=(1, 1))]] * 2
    batch = dict(inputs=to_batch(images), data_samples=list(range(64)))
    out = preprocessor(views=whole, equi_ratio=0.25)(batch, training=True)
    order = out['data_samples']
    torch.manual_seed(0)
    kept = resized_crop(
        to_batch(images).flip(1).float(),
        DeviceView(whole[0]).draw(64, (SIZE, SIZE)),
        (32, 32),
        _KERNELS['pillow', 'bilinear'],
    )
    assert torch.equal(out['inputs'][0].base, kept[order[:48]])
    assert sorted(order) == list(range(64)) and order != list(range(64))


def test_evaluation_gets_images_as_they_are(images):
    out = preprocessor(equi_ratio=0.5)(dict(inputs=to_batch(images), data_samples=None))
    assert torch.equal(out['inputs'], to_batch(images).flip(1).float())


def test_mixed_precision_does_not_touch_it(images):
    expected = make(images, equi_ratio=0)
    with torch.autocast('cpu', torch.bfloat16):
        for view, other in zip(expected, make(images, equi_ratio=0), strict=True):
            assert torch.equal(view.base, other.base)


def test_as_many_are_in_b2_as_are_asked_for(images):
    for n, ratio in itertools.product((2, 7, 64), (0.01, 1 / 16, 0.5, 1)):
        view = make(images[:n], views=[[CROP]] * 2, equi_ratio=ratio)[0]
        assert len(view.equi) == max(round(ratio * n), 2) and len(view) == n
    for ratio, n, ranks in itertools.product((0, 0.01, 1 / 16, 0.3, 1), (1, 4, 33), (1, 2, 5)):
        own = [count_b2_of_rank(ratio, n, rank, ranks) for rank in range(ranks)]
        assert sum(own) == count_b2(ratio, n * ranks) and max(own) - min(own) <= 1


def changed(**options):
    return [dict(CROP, **options), FLIP]


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(views=[changed(interpolation='lanczos')] * 2), "backend='pillow' with interpolation"),
        (dict(views=[[dict(type='EfficientNetRandomCrop', scale=32)]] * 2), 'use type='),
        (dict(views=[[CROP, dict(type='Rotate', angle=3.0)]] * 2), 'Rotate cannot run on the'),
        (dict(views=[[JITTER, CROP]] * 2), 'RandomResizedCrop cannot run on the device'),
        (dict(views=[[CROP, FLIP, FLIP]] * 2), '2 RandomFlip'),
        (dict(views=[[dict(FLIP, direction='vertical')]] * 2), "direction='vertical'"),
        (dict(views=[[CROP], changed(scale=16)]), 'begin with other crops'),
        (dict(views=[changed(scale=30)] * 2), '30 x 30 are not whole patches'),
        (dict(views=[changed(scale=(32, 16))] * 2), 'make them square'),
        (dict(views=[[CROP]]), 'give views=..., the pipeline of each|two or'),
        (dict(views=None), 'set equi_ratio in EquivariantViewPipeline'),
        (dict(photometry=[[], []]), 'leave out photometry'),
        (dict(views=[]), 'not empty'),
    ],
    ids=str,
)
def test_bad_config_is_one_sentence_at_build(options, said):
    with pytest.raises(ValueError, match=said) as error:
        preprocessor(**{'equi_ratio': 0.5, **options})
    assert '\n' not in str(error.value)


def test_the_order_of_channels_has_to_be_said(images):
    pixels = {k: x for k, x in PIXELS.items() if k != 'to_rgb'}
    with pytest.raises(ValueError, match='set to_rgb=True, .* or to_rgb=False where they are RGB'):
        SERDataPreprocessor(views=VIEWS, **pixels)
    SERDataPreprocessor(views=[[CROP, FLIP]], **pixels)  # which any order does for
    swapped = make(images[..., ::-1], to_rgb=False)  # as CIFAR's are
    assert all(map(torch.equal, make(images), swapped))


def test_configs_in_other_forms(images):
    views = ConfigDict(views=VIEWS).views
    expected = make(images, equi_ratio=0.25)
    made = make(images, views=tuple(map(tuple, views)), equi_ratio=np.float64(0.25))
    assert all(torch.equal(a.equi, b.equi) for a, b in zip(expected, made, strict=True))


def test_batches_that_are_not_plain_images(images):
    views = [to_batch(images)] * 2
    for inputs in (views, [*views, torch.full((64, 2), -1)], list(to_batch(images)[:2])):
        with pytest.raises(ValueError, match='views are made of plain images') as error:
            preprocessor(equi_ratio=0.5)(dict(inputs=inputs), training=True)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='48 x 40 are not|48 x 40 cannot be turned'):
        preprocessor(views=[[FLIP]] * 2, equi_ratio=0.5)(
            dict(inputs=to_batch(images)[..., :40]), training=True
        )
