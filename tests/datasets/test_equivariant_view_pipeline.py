"""EquivariantViewPipeline and SERDataPreprocessor: from pixels to b1 and b2."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from mmpretrain.registry import TRANSFORMS

from ser_mm import geometry
from ser_mm.draws import NUM_DRAWS, places
from ser_mm.models import SERDataPreprocessor
from ser_mm.views import ViewBatch, pack_maps, unpack_maps
from tests.support import reference

SIZE = 16
CROP = dict(type='RandomResizedCrop', scale=SIZE)
JITTER = dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
FLIP = dict(type='RandomFlip', prob=0.5)
VIEWS = [[CROP, JITTER, FLIP], [CROP, FLIP]]


def pipeline(equi_ratio, **options):
    init_default_scope('mmpretrain')
    config = dict(
        type='EquivariantViewPipeline',
        equi_ratio=equi_ratio,
        views=VIEWS,
        equi_crop=[CROP],
        equi_views=[[], []],
    )
    return TRANSFORMS.build({**config, **options})


def batch(transform, images, in_b2=None, **extra):
    """Images (H, W, 3) through the transform, the default PackInputs and default_collate."""
    pack = TRANSFORMS.build(dict(type='PackInputs'))
    samples = []
    for i, x in enumerate(images):
        if in_b2 is not None:
            transform.in_b2 = in_b2[i]  # as ExactSplit does
        samples.append(pack(transform(dict(img=x, **extra))))
    return default_collate(samples)


def photos(n, size=24, seed=0):
    """No pixel is 0, so that what float64 gets to 1e-10 is exact in float32."""
    return np.random.default_rng(seed).integers(1, 256, (n, size, size, 3), dtype=np.uint8)


def containers(images, scale, aspect_ratio, patch_size=4, equi_crop=(), **options):
    data = batch(pipeline(1, equi_crop=list(equi_crop), **options), images)
    preprocessor = SERDataPreprocessor(scale, aspect_ratio, patch_size)
    return preprocessor(data, training=True)['inputs']


def to_view_2(view_1, view_2):
    """View 1 acted on with g2 g1^-1."""
    g_1, g_2 = geometry.matrices(view_1.elements), geometry.matrices(view_2.elements)
    g = geometry.compose(g_2, geometry.invert(g_1))
    return geometry.act(view_1.equi, g, view_2.equi.shape[-2:])


def test_action_gives_the_other_view_exactly_for_all_pairs():
    """On the grid of the images themselves, with photometry off.

    Resizing to that grid has weights of 0 and 1; acting is off by 2e-11, 64 times what
    test_geometry derives, which float32 rounds away.
    """
    np.random.seed(0)
    images = photos(600, SIZE)
    view_1, view_2 = containers(images, (1, 1), (1, 1))
    pairs = set(zip(view_1.elements.tolist(), view_2.elements.tolist(), strict=True))
    assert pairs == set(itertools.product(range(8), repeat=2))
    assert torch.equal(to_view_2(view_1, view_2), view_2.equi)
    assert torch.equal(to_view_2(view_2, view_1), view_1.equi)
    # and the views are what their elements say of the images
    for view in (view_1, view_2):
        for x, moved, element in zip(images, view.equi, view.elements, strict=True):
            x = torch.from_numpy(x).permute(2, 0, 1).float()
            assert torch.equal(reference.move(x, element), moved)


def smooth(n, size):
    """Sums of cosines with no slope across the borders, and the steepest slope per axis."""
    rng = np.random.default_rng(0)
    waves = range(3)
    weights = rng.normal(size=(n, 3, 3, 3))
    weights[:, 0, 0] = 0
    weights *= 110 / np.abs(weights).sum(axis=(1, 2), keepdims=True)
    places = (np.arange(size) + 0.5) / size
    basis = np.stack([np.cos(np.pi * k * places) for k in waves])
    images = 128 + np.einsum('nabc,ay,bx->nyxc', weights, basis, basis)
    k = np.pi * np.arange(3)
    slope, bend = (
        max(
            (np.abs(weights) * axis**n).sum(axis=(1, 2)).max()
            for axis in (k[:, None, None], k[:, None])
        )
        for n in (1, 2)
    )
    return np.round(images).astype(np.uint8), slope, bend


def test_action_gives_the_other_view_for_random_scales_and_aspects():
    """To the error of bicubic interpolation, in grey levels of 255, bounded for these images.

    Between pixels a distance h apart, at the fraction t, the kernel (a = -3/4) is exact for
    constants and misses a slope by t(1 - t)(2t - 1)/2 of its change over h, at most 0.0482. The
    rest of a Taylor series is at most h^2 bend / 2 times the sum of weights times squared
    distances, 0.36 h^2 bend. At a border, a pixel beyond the second repetition has weight 0.094 at
    most and is off by h^2 bend, as no slope crosses the borders. One interpolation along an axis is
    off by e(h), the sum of these; it blows up what its pixels were off by the sum of absolute
    weights, at most 1.375. Rounding the images to uint8 makes them off by 1/2, and resizing them in
    float32 by 0.03, as in the next test with positions up to 128.
    """
    np.random.seed(0)
    torch.manual_seed(0)
    size, patch = 128, 8
    images, slope, bend = smooth(16, size)

    def error(h):
        one_axis = 0.0482 * h * slope + (0.36 + 0.094) * h**2 * bend
        return one_axis + 1.375 * one_axis

    blow_up = 1.375**2
    sizes = set()
    for _ in range(12):
        view_1, view_2 = containers(images, (0.5, 1.5), (1 / 2, 2), patch)
        sizes |= {tuple(view.equi.shape[-2:]) for view in (view_1, view_2)}
        # a view is the image to rounding and one interpolation, and acting on it one more
        once = error(1 / size) + 0.5 * blow_up + 0.03
        twice = error(1 / min(view_1.equi.shape[-2:])) + once * blow_up
        off = (to_view_2(view_1, view_2) - view_2.equi).abs().max()
        assert off <= once + twice
        assert once + twice < 7  # of 220 grey levels that the images span
        view_2.elements = (view_2.elements + 1) % 8  # any other element is far off
        wrong = (to_view_2(view_1, view_2) - view_2.equi).abs().flatten(1).amax(1)
        assert (wrong > 3 * (once + twice)).all()
    assert len(sizes) > 12


def test_preprocessor_resizes_as_interpolate_does_in_float64():
    images = photos(4, SIZE)
    torch.manual_seed(3)
    for view in containers(images, (0.5, 1.5), (1 / 2, 2)):
        moved = torch.stack(
            [
                reference.move(torch.from_numpy(x).permute(2, 0, 1).double(), element)
                for x, element in zip(images, view.elements, strict=True)
            ]
        )
        expected = F.interpolate(moved, view.equi.shape[-2:], mode='bicubic')
        # Positions up to 16, of three operations in float32, are off by 3e-6; per pixel values
        # change by 2 * 3 * 1.375 * 255 / 2 at most; 16 products and their weights add 7e-4.
        torch.testing.assert_close(view.equi.double(), expected, rtol=0, atol=4e-3)


def test_grids_are_whole_patches_within_their_ranges():
    torch.manual_seed(0)
    images = photos(1, 224)
    data = batch(pipeline(1, equi_crop=[]), images)
    preprocessor = SERDataPreprocessor((0.7, 1.3), (3 / 4, 4 / 3), 16)
    grids = []
    for _ in range(300):
        for view in preprocessor(dict(data))['inputs']:
            height, width = view.equi.shape[-2:]
            assert height % 16 == width % 16 == 0
            grids.append((height // 16, width // 16))
    areas = torch.tensor([h * w for h, w in grids]) / 14**2
    aspects = torch.tensor([w / h for h, w in grids]).log()
    # rounding moves each side, of 10 tokens and more, by half a token at most
    assert 0.7 * 0.9 < areas.min() < 0.75 and 1.25 < areas.max() < 1.3 * 1.1
    assert aspects.abs().max() < math.log(4 / 3) + 0.1
    # means of 600 uniform draws, to 5 deviations, and half a token of 14
    assert abs(areas.mean() - 1) < 5 * 0.6 / 12**0.5 / 600**0.5 + 0.01
    assert abs(aspects.mean()) < 5 * 2 * math.log(4 / 3) / 12**0.5 / 600**0.5 + 0.01
    drawn_apart = sum(a != b for a, b in zip(grids[::2], grids[1::2], strict=True))
    assert drawn_apart > 250  # each view has a grid of its own
    assert len(set(grids)) > 20


def test_normalizes_as_mmpretrain_and_keeps_every_image():
    images = photos(40)
    options = dict(mean=[1.0, 2, 3], std=[4.0, 5, 6], to_rgb=True)
    np.random.seed(0)
    data = batch(
        pipeline(0.4), images, in_b2=[i % 5 in (1, 2) for i in range(len(images))], sample_idx=0
    )
    for i, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(sample_idx=i))
    *views, record = data['inputs']
    in_b2 = record[:, 0] >= 0
    assert 0 < in_b2.sum() < 40
    out = SERDataPreprocessor((1, 1), (1, 1), 4, **options)(data, training=True)
    mean, std = (torch.tensor(options[k])[:, None, None] for k in ('mean', 'std'))
    for v, (view, x) in enumerate(zip(out['inputs'], views, strict=True)):
        x = (x.flip(1).float() - mean) / std
        assert torch.equal(view.base, x[~in_b2])
        assert torch.equal(view.equi, x[in_b2])  # resized with weights of 0 and 1
        assert torch.equal(view.elements, record[in_b2, v])
        assert len(view) == 40 and view.token_maps == {}
    order = [sample.sample_idx for sample in out['data_samples']]
    assert order == [*(~in_b2).nonzero().flatten(), *in_b2.nonzero().flatten()]


def test_one_tensor_is_only_normalized():
    images = torch.randint(256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    out = SERDataPreprocessor(mean=[1.0, 1, 1], std=[2.0, 2, 2])(
        dict(inputs=images, data_samples=[])
    )
    assert torch.equal(out['inputs'], (images.float() - 1) / 2)


def test_elements_are_uniform():
    np.random.seed(0)
    transform = pipeline(1, views=[[], []], equi_crop=[])
    n = 6000
    x = photos(1, 2)[0]
    records = torch.stack([transform(dict(img=x))['img'][-1] for _ in range(n)])
    assert (records >= 0).all()
    for counts, p in (
        (records[:, 0].bincount(minlength=8), 1 / 8),
        (records[:, 1].bincount(minlength=8), 1 / 8),
        ((records[:, 0] * 8 + records[:, 1]).bincount(minlength=64), 1 / 64),  # independent draws
    ):
        low, high = reference.binomial_range(n, p)
        assert len(counts) == round(1 / p) and low <= counts.min() and counts.max() <= high


def test_without_b2_the_views_are_those_of_multi_view():
    images = photos(8)
    multi_view = TRANSFORMS.build(dict(type='MultiView', num_views=[1, 1], transforms=VIEWS))
    np.random.seed(5)
    *views, record = batch(pipeline(0), images)['inputs']
    np.random.seed(5)
    expected = batch(multi_view, images)['inputs']
    assert len(expected) == 2 and (record == -1).all() and record.shape == (8, 2)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_all_images_in_b2():
    view_1, view_2 = containers(photos(5), (1, 1), (1, 1), equi_crop=[CROP])
    for view in (view_1, view_2):
        assert view.base.shape == (0, 3, SIZE, SIZE) and view.equi.shape == (5, 3, SIZE, SIZE)


def test_no_image_in_b2():
    data = batch(pipeline(0), photos(5))
    for view in SERDataPreprocessor(patch_size=4)(data)['inputs']:
        assert view.base.shape == (5, 3, SIZE, SIZE) and view.equi.shape[:2] == (0, 3)
        assert view.elements.shape == (0,)


def test_photometry_is_drawn_per_view_and_the_crop_is_shared():
    class Shade:
        def __call__(self, results):
            results['img'] = np.full_like(results['img'], np.random.randint(256))
            return results

    np.random.seed(0)
    view_1, view_2 = containers(
        photos(20), (1, 1), (1, 1), equi_views=[[Shade()], [Shade()]], equi_crop=[CROP]
    )
    shades = torch.stack([view.equi.flatten(1).amax(1) for view in (view_1, view_2)])
    assert (shades[0] != shades[1]).sum() > 15
    view_1, view_2 = containers(photos(20), (1, 1), (1, 1), equi_crop=[CROP])
    torch.testing.assert_close(to_view_2(view_1, view_2), view_2.equi, rtol=0, atol=1e-10)


def test_image_is_left_as_it_was():
    x = photos(1)[0]
    before = x.copy()
    pipeline(1)(dict(img=x))
    assert np.array_equal(x, before)


def test_local_views_of_b2_are_those_of_b1():
    np.random.seed(0)
    local = dict(type='RandomResizedCrop', scale=8)
    data = batch(
        pipeline(0.5, views=[*VIEWS, [local], [local]]), photos(12), in_b2=[False, True, True] * 4
    )
    assert [tuple(x.shape) for x in data['inputs']] == [
        *[(12, 3, SIZE, SIZE)] * 2,
        *[(12, 3, 8, 8)] * 2,
        (12, 2),
    ]
    *views, record = data['inputs']
    out = SERDataPreprocessor(patch_size=4)(data)['inputs']
    assert [type(view) for view in out] == [ViewBatch, ViewBatch, torch.Tensor, torch.Tensor]
    in_b2 = record[:, 0] >= 0
    assert 0 < in_b2.sum() < 12
    order = torch.cat([(~in_b2).nonzero(), in_b2.nonzero()]).flatten()
    for view, x in zip(out[2:], views[2:], strict=True):
        assert torch.equal(view, x[order].float())


def test_packing_maps():
    maps = [torch.randn(2, 3, 4, 5), torch.randn(0, 3, 2, 2), torch.randn(1, 3, 1, 6)]
    packed = pack_maps(maps)
    tokens = [x[i, :, y, z] for x in maps for i, y, z in np.ndindex(len(x), *x.shape[2:])]
    assert torch.equal(packed, torch.stack(tokens))
    for a, b in zip(unpack_maps(packed, maps), maps, strict=True):
        assert torch.equal(a, b)
    assert [x.shape for x in unpack_maps(packed[:, :1], maps)] == [
        (2, 1, 4, 5),
        (0, 1, 2, 2),
        (1, 1, 1, 6),
    ]


def test_draws_travel_with_the_view_and_the_image_that_they_made():
    """On ramps, whose mean tells where an image was cropped, to a grey level or so; the second view
    alone is mirrored.
    """
    crop = dict(type='RandomResizedCrop', scale=SIZE, crop_ratio_range=(0.05, 0.3))
    flipped = [crop, dict(type='RandomFlip', prob=1.0)]
    transform = pipeline(0, views=[[crop], flipped], equi_views=None, record_draws=True)
    ramp = np.tile(np.arange(120, dtype=np.uint8)[None, :, None], (80, 1, 3))
    data = batch(transform, [ramp] * 6)
    assert data['inputs'][2].shape == (6, 2, NUM_DRAWS)
    views = SERDataPreprocessor(patch_size=4)(data, training=True)['inputs']
    assert len(views) == 2
    left, width, flip = places('left', 'width', 'flip')
    for v, view in enumerate(views):
        assert view.draws[:, flip].eq(v).all()
        middle = 120 * (view.draws[:, left] + view.draws[:, width] / 2) - 0.5
        means = view.base.mean(dim=(1, 2, 3))
        assert means.std() > 5  # crops differ
        torch.testing.assert_close(means, middle, rtol=0, atol=1.5)


def test_extra_views_draw_anew_for_each_image_and_by_the_seed():
    transform = pipeline(0, extra_views=[[CROP], [CROP]])
    images = np.repeat(photos(1), 4, axis=0)

    def extra():
        np.random.seed(0)
        return torch.stack(batch(transform, images)['inputs'][2:4]).flatten(0, 1).flatten(1)

    made = extra()
    assert len(made.unique(dim=0)) == 8
    assert torch.equal(extra(), made)
