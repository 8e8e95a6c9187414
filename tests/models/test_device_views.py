"""Views made on the device: those of MMPretrain's, given the draws, and in distribution."""

import itertools

import mmcv
import numpy as np
import pytest
import skimage.data
import torch
from mmcv.transforms import Compose
from mmpretrain.datasets.transforms import RandomResizedCrop
from mmpretrain.registry import TRANSFORMS
from scipy.stats import chisquare, ks_2samp

from ser_mm.models.device_views import _KERNELS, Crops, DeviceView, draw_boxes, resized_crop
from tests.support.device_views import (
    FLIP,
    LEVEL,
    SOLARIZE,
    VIEWS,
    pieces,
    to_batch,
)


@pytest.fixture(scope='module')
def images():
    return pieces()


# What Pillow and OpenCV lose by working on bytes. Pillow rounds between its two passes, by half a
# level, of which the second one, whose weights sum to at most 1.25 without their signs (1 of a
# triangle), makes more, and at the end; OpenCV has weights of 11 bits, each off by half of 2^-11,
# and two of them an axis for values of up to 255, cuts each of two sums to quarters of a level, and
# rounds at the end.
LEVELS = {
    ('pillow', 'bilinear'): 1.0,
    ('pillow', 'bicubic'): 0.5 * 1.25 + 0.5,
    ('cv2', 'bilinear'): 4 * 255 * 2**-12 + 2 / 4 + 0.5,
}


def difference(images, kernel, backend, interpolation, size):
    """The largest one to what the host makes of the same boxes."""
    # Bicubic weights overshoot; without values near 0 and 255 no order of passes and cuts matters.
    images = (64 + images // 2).astype(np.uint8)
    torch.manual_seed(0)
    boxes = draw_boxes(RandomResizedCrop(size, (0.05, 1.0)), len(images), images.shape[1:3])
    flips = torch.rand(len(images)) < 0.5
    made = resized_crop(to_batch(images).float(), Crops(boxes, flips), size, kernel)
    expected = []
    for image, (top, left, height, width), flip in zip(
        images, boxes.tolist(), flips.tolist(), strict=True
    ):
        crop = mmcv.imresize(
            image[top : top + height, left : left + width],
            size[::-1],
            interpolation=interpolation,
            backend=backend,
        )
        expected.append(mmcv.imflip(crop) if flip else crop)
    return (made - to_batch(np.stack(expected))).abs().max().item()


@pytest.mark.parametrize('size', [(48, 48), (16, 16), (24, 80)], ids=str)
@pytest.mark.parametrize('backend, interpolation', _KERNELS)
def test_crops_are_those_of_the_host(backend, interpolation, size, images):
    """In float32, two sums of at most 48 terms of up to 255 add 2 * 2 * 48 * 255 * 2^-24 = 3e-3."""
    kernel = _KERNELS[backend, interpolation]
    bound = LEVELS[backend, interpolation] + 3e-3
    assert difference(images, kernel, backend, interpolation, size) <= bound
    # Another interpolation, or one that does (not) antialias, would be seen.
    others = [x for x in _KERNELS.values() if x.weights is not kernel.weights]
    if min(size) < 48:
        others.append(kernel._replace(antialias=not kernel.antialias))
    for other in others:
        assert difference(images, other, backend, interpolation, size) > 2 * bound


def test_whole_pixels_come_back(images):
    """Without a crop nothing is resized: weights are 0 and 1."""
    batch = to_batch(images).float()
    view = DeviceView([FLIP])
    for kernel in _KERNELS.values():
        crops = view.draw(len(batch), batch.shape[-2:])
        made = resized_crop(batch, crops, batch.shape[-2:], kernel)
        flipped = torch.where(crops.flips[:, None, None, None], batch.flip(3), batch)
        assert torch.equal(made, flipped) and torch.equal(view(batch, crops), flipped)
    assert 0 < crops.flips.sum() < len(batch)


DRAWS, VIEWED = 3000, 1000
LAWS = {
    'square': ((48, 48), {}),
    'wide': ((40, 90), {}),
    'small': ((48, 48), dict(crop_ratio_range=(0.05, 0.25))),
    # Of few attempts none fits in half of the cases, and the centred box is taken.
    'fallback': ((30, 90), dict(crop_ratio_range=(0.3, 1.0), max_attempts=2)),
    'none': ((90, 40), dict(max_attempts=0)),
}


def box_statistics(boxes, size):
    top, left, height, width = boxes.double().unbind(1)
    return dict(
        area=height * width,
        aspect=width / height,
        top=top / (size[0] - height).clamp(min=1),
        left=left / (size[1] - width).clamp(min=1),
    )


def of_mmpretrain(crop, n, size):
    np.random.seed(0)
    image = np.zeros((*size, 3), np.uint8)
    return torch.tensor([crop.rand_crop_params(image) for _ in range(n)])


def p_values(a, b):
    """Of the two-sample Kolmogorov-Smirnov test; with ties it errs to the larger side."""
    return {k: ks_2samp(a[k].numpy(), b[k].numpy()).pvalue for k in a}


@pytest.mark.parametrize('name', LAWS)
def test_boxes_have_the_law_of_mmpretrain(name):
    """Twenty tests at 0.001 with fixed seeds."""
    size, options = LAWS[name]
    crop = RandomResizedCrop(32, **options)
    boxes = draw_boxes(crop, DRAWS, size)
    assert boxes.dtype == torch.int64
    expected = box_statistics(of_mmpretrain(crop, DRAWS, size), size)
    found = p_values(box_statistics(boxes, size), expected)
    assert min(found.values()) > LEVEL, found
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()
    assert (boxes[:, 2:] > 0).all()


def square_root_law(crop, n, size):
    """Sides uniform, in place of areas."""
    crop = RandomResizedCrop(32, tuple(x**0.5 for x in crop.crop_ratio_range), (1, 1))
    boxes = draw_boxes(crop, n, size)
    side = (boxes[:, 2:].double() ** 2 / size[0]).round().clamp(1, size[0]).long()
    return torch.cat([boxes[:, :2], side], dim=1)


def first_attempt(crop, n, size):
    """Boxes cut where they do not fit, in place of drawn anew."""
    low, high = crop.crop_ratio_range
    area = (low + (high - low) * torch.rand(n)) * size[0] * size[1]
    aspect = torch.exp(np.log(4 / 3) * (2 * torch.rand(n) - 1))
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 1)
    sides = torch.minimum(sides, torch.tensor(size)).round()
    return torch.cat([(torch.rand(n, 2) * (torch.tensor(size) - sides + 1)).floor(), sides], 1)


def linear_aspect(crop, n, size):
    """Aspect ratio uniform, in place of its logarithm."""
    crop = RandomResizedCrop(32, crop.crop_ratio_range, (0.75, 1.15))
    return draw_boxes(crop, n, size)


def centred(crop, n, size):
    boxes = draw_boxes(crop, n, size)
    return torch.cat([(torch.tensor(size) - boxes[:, 2:]) // 2, boxes[:, 2:]], dim=1)


@pytest.mark.parametrize('law', [square_root_law, first_attempt, linear_aspect, centred])
def test_another_law_of_boxes_would_be_seen(law):
    size, crop = (48, 48), RandomResizedCrop(32)
    expected = box_statistics(of_mmpretrain(crop, DRAWS, size), size)
    found = p_values(box_statistics(law(crop, DRAWS, size), size), expected)
    assert min(found.values()) < LEVEL, found


def view_statistics(images):
    """Of each image (N, 3, H, W): numbers that every step moves."""
    gray = images.mean(1)
    spread = images.amax(1) - images.amin(1)
    half = gray.shape[2] // 2
    return dict(
        mean=gray.mean((1, 2)),
        std=gray.std((1, 2)),
        saturation=spread.mean((1, 2)),
        edges=(gray[:, :, 1:] - gray[:, :, :-1]).abs().mean((1, 2)),
        side=gray[:, :, :half].mean((1, 2)) - gray[:, :, half:].mean((1, 2)),
        solarized=(images.amax((1, 2, 3)) < 128.5).double(),
    )


def by_mmpretrain(view, images, n):
    np.random.seed(0)
    pipeline = Compose([TRANSFORMS.build(x) for x in view])
    chosen = images[np.random.randint(len(images), size=n)]
    made = np.stack([pipeline(dict(img=x, img_shape=x.shape[:2]))['img'] for x in chosen])
    return view_statistics(to_batch(made).flip(1).double())


def on_device(view, images, n):
    torch.manual_seed(0)
    view = DeviceView(view)
    parts = [
        # The order of colour steps is drawn per batch, so these are small.
        view(part.flip(1).float(), view.draw(len(part), part.shape[-2:]))
        for part in to_batch(images[np.random.randint(len(images), size=n)]).split(8)
    ]
    return view_statistics(torch.cat(parts).double())


@pytest.mark.parametrize('v', [0, 1])
def test_whole_views_have_the_distribution_of_mmpretrain(v, images):
    """12 tests at 0.001 with fixed seeds; then views whose steps stand in another order."""
    one_sided = np.sort(images, axis=2)  # so that a flip is seen
    expected = by_mmpretrain(VIEWS[v], one_sided, VIEWED)
    found = p_values(on_device(VIEWS[v], one_sided, VIEWED), expected)
    assert min(found.values()) > LEVEL, found
    crop, jitter, third, _ = VIEWS[v]
    faults = {
        'no flip': [crop, jitter, third],
        'other crops': [dict(crop, crop_ratio_range=(0.5, 1.0)), jitter, third, FLIP],
        'no jitter': [crop, third, FLIP],
    }
    if third is SOLARIZE:
        faults['order'] = [crop, third, jitter, FLIP]
    for name, view in faults.items():
        found = p_values(on_device(view, one_sided, VIEWED), expected)
        assert min(found.values()) < LEVEL, (name, found)


def test_steps_of_jitter_come_in_any_order():
    """With fixed factors an image shows in which order it was changed; all 24 are equally likely.

    A level of 1e-3 for the frequencies of 720 draws; an image is of the order that is nearest.
    """
    image = skimage.data.astronaut()[:480:10, :480:10, ::-1]
    factors = dict(brightness=1.6, contrast=1.8, saturation=0.5, hue=0.25)
    jitter = dict(type='ColorJitter', **{k: (x, x) for k, x in factors.items()})
    host = TRANSFORMS.build(jitter)
    made = []
    for order in itertools.permutations(range(4)):
        host._cache_enabled, host._cache = True, dict(_rand_params=(order, *factors.values()))
        made.append(host(dict(img=image))['img'])
    made = to_batch(np.stack(made)).flip(1).float()
    view = DeviceView([jitter])
    batch = to_batch(image[None]).flip(1).float()
    drawn = torch.cat([view(batch, view.draw(1, batch.shape[-2:])) for _ in range(720)])
    distances, orders = torch.cdist(drawn.flatten(1), made.flatten(1)).sort(1)
    assert (distances[:, 1] > 1.5 * distances[:, 0]).all()  # each is one of them
    assert chisquare(orders[:, 0].bincount(minlength=24).numpy()).pvalue > LEVEL
