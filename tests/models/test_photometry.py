"""Photometry on the device: that of MMPretrain's transforms, image by image and in distribution."""

import random

import numpy as np
import pytest
import skimage.data
import torch
from mmengine.config import Config
from mmpretrain.registry import TRANSFORMS
from scipy.stats import ks_2samp

from ser_mm.models import SERDataPreprocessor
from ser_mm.models.photometry import Photometry
from tests.support import policies
from tests.support.paths import ROOT

CONFIG = Config.fromfile(ROOT / 'configs' / 'ser_mocov3_vits16_device_views.py')
POLICIES = CONFIG.photometry1, CONFIG.photometry2
SIZE = 40


@pytest.fixture(scope='module')
def crops():
    """Crops of photographs, uint8 (N, H, W, 3), in BGR order as pipelines load them."""
    rng = np.random.default_rng(0)
    out = []
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket'):
        photo = getattr(skimage.data, name)()[::2, ::2]  # as large as an object in a crop
        for _ in range(25):
            top, left = (rng.integers(side - SIZE) for side in photo.shape[:2])
            out.append(photo[top : top + SIZE, left : left + SIZE, ::-1])
    return np.stack(out)


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def by_mmpretrain(transforms, images):
    """RGB (N, 3, H, W)."""
    transforms = [TRANSFORMS.build(x) for x in policies.of_mmpretrain(transforms)]
    out = []
    for image in images:
        results = dict(img=image)
        for transform in transforms:
            results = transform(results)
        out.append(results['img'])
    return to_rgb(np.stack(out))


def to_rgb(images):
    return torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).double()


def jitter(**options):
    return dict(type='ColorJitter', **options)


# What uint8 images lose: a grey level where a step is cut; where it works with grey, half a level
# of that, and of its mean, times the factor; for the hue, a saturation of 8 bits, half a level in
# the end, and what the test says; for the blur, half a level for each of three passes and two axes.
FIXED = {
    'brightness': (jitter(brightness=(1.3, 1.3)), 1),
    'darkness': (jitter(brightness=(0.7, 0.7)), 1),
    'contrast': (jitter(contrast=(0.6, 0.6)), 1.5),
    'more contrast': (jitter(contrast=(1.4, 1.4)), 1.5),
    'saturation': (jitter(saturation=(0.8, 0.8)), 1.5),
    'more saturation': (jitter(saturation=(1.2, 1.2)), 1.5),
    'hue': (jitter(hue=(0.1, 0.1)), 1.5),
    'hue, back': (jitter(hue=(-0.1, -0.1)), 1.5),
    'grey': (
        dict(
            type='RandomGrayscale',
            prob=1.0,
            keep_channels=True,
            channel_weights=(0.114, 0.587, 0.2989),
        ),
        1,
    ),
    'solarize': (dict(type='Solarize', thr=128, prob=1.0), 0),
    **{
        f'blur {radius}': (dict(type='GaussianBlur', radius=radius, prob=1.0), 3)
        for radius in (0.1, 0.4, 0.8, 1.5, 2.0)
    },
}


@pytest.mark.parametrize('name', FIXED)
def test_each_transform_is_that_of_mmpretrain(name, crops):
    transform, levels = FIXED[name]
    images = Photometry([transform])(to_rgb(crops).float())
    expected = by_mmpretrain([transform], crops)
    off = (images - expected).abs()
    if name.startswith('hue'):
        # Hues are cut to 255ths of a turn, so is the angle, here to half of one, and a turn has 256
        # of them. A colour goes through six times its range in a turn.
        original = to_rgb(crops)
        chroma = original.amax(1, keepdim=True) - original.amin(1, keepdim=True)
        off = off - 2.5 / 255 * 6 * chroma
    if name.startswith('blur'):  # Pillow's boxes repeat the border anew for each of the three
        off = off[..., 6:-6, 6:-6]
    # float32 adds, for two sums of 13 taps, 2 * 26 operations on values of up to 255: 8e-4.
    assert off.max() <= levels + 1e-3
    if name != 'blur 0.1':  # which is next to nothing
        assert (images - to_rgb(crops)).abs().max() > 10 * levels


def statistics(images):
    """Of each image: numbers that every step of the policy moves, and what it can be told by."""
    red, green, blue = images.unbind(1)
    gray = images.mean(1)
    spread = images.amax(1) - images.amin(1)
    edges = (gray[:, 1:] - gray[:, :-1]).abs().mean((1, 2)) + 1
    return dict(
        mean=gray.mean((1, 2)),
        std=gray.std((1, 2)),
        saturation=spread.mean((1, 2)),
        red_blue=(red - blue).mean((1, 2)),
        green=(2 * green - red - blue).mean((1, 2)),
        edges=edges / (gray.std((1, 2)) + 1),  # energy of fine detail: what a blur takes
        grey=(spread.amax((1, 2)) < 1.5).double(),
        solarized=(images.amax((1, 2, 3)) < 128.5).double(),
    )


DRAWS, LEVEL = 2400, 1e-3


def draw(policy, crops, number, on_device):
    """Statistics of images drawn with replacement, changed by a policy."""
    seed(number)
    images = crops[np.random.randint(len(crops), size=DRAWS)]
    if on_device:
        # The order of colour steps is drawn per batch, so these are small.
        parts = map(Photometry(policy), to_rgb(images).float().split(8))
        return statistics(torch.cat(list(parts)).double())
    return statistics(by_mmpretrain(policy, images))


def p_values(a, b):
    """Of the two-sample Kolmogorov-Smirnov test; for shares, which are 0 or 1, it is one too."""
    return {k: ks_2samp(a[k].numpy(), b[k].numpy()).pvalue for k in a}


@pytest.fixture(scope='module')
def of_mmpretrain(crops):
    return [draw(policy, crops, view, on_device=False) for view, policy in enumerate(POLICIES)]


@pytest.mark.parametrize('view', [0, 1])
def test_policies_have_the_distribution_of_mmpretrain(view, crops, of_mmpretrain):
    """16 tests at 0.001: chance fails one in 60 sets of seeds, and these are fixed.

    Both sides draw on the host, the same on every processor, whose rounding only moves values that
    are next to each other past one another.
    """
    found = p_values(draw(POLICIES[view], crops, 10 + view, on_device=True), of_mmpretrain[view])
    assert min(found.values()) > LEVEL, found
    if view == 1:
        assert 0.15 < of_mmpretrain[view]['grey'].mean() < 0.25


CHANGES = {
    'brightness': lambda p: p[0]['transforms'][0].update(brightness=0.2),
    'contrast': lambda p: p[0]['transforms'][0].update(contrast=0.1),
    'saturation': lambda p: p[0]['transforms'][0].update(saturation=(0.6, 1)),
    'hue': lambda p: p[0]['transforms'][0].update(hue=0.0),
    'jitter': lambda p: p[0].update(prob=0.5),
    'grey': lambda p: p[1].update(prob=0.1),
    'blur': lambda p: p[2].update(prob=0.3),
    'sigma': lambda p: p[2].update(prob=1.0, magnitude_range=(0.1, 1.0)),
    'solarize': lambda p: p[3].update(prob=0.1),
}


@pytest.mark.parametrize('name', CHANGES)
def test_the_distributions_would_show_another_policy(name, crops, of_mmpretrain):
    view = 0 if name == 'sigma' else 1
    policy = Config(dict(policy=POLICIES[view])).policy
    CHANGES[name](policy)
    found = p_values(draw(policy, crops, 20, on_device=True), of_mmpretrain[view])
    assert min(found.values()) < LEVEL, found


def batch(crops, n=12):
    views = [torch.from_numpy(crops[:n].copy()).permute(0, 3, 1, 2) for _ in range(2)]
    record = torch.full((n, 2), -1)
    record[[2, 5, 7]] = torch.tensor([1, 4])
    return dict(inputs=[*views, record], data_samples=None)


def preprocessor(**options):
    options = dict(mean=[0.0] * 3, std=[1.0] * 3, to_rgb=True, photometry=POLICIES) | options
    return SERDataPreprocessor((1, 1), (1, 1), patch_size=SIZE, **options)


def test_views_and_images_are_drawn_apart_and_as_the_seed_says(crops):
    same = np.repeat(crops[:1], 12, axis=0)
    options = dict(photometry=[POLICIES[0]] * 2)  # which leaves no image as it is
    seed(0)
    first = preprocessor(**options)(batch(same))['inputs']
    again = preprocessor(**options)(batch(same))['inputs']
    seed(0)
    resumed = preprocessor(**options)(batch(same))['inputs']
    for a, b, c in zip(first, again, resumed, strict=True):
        assert torch.equal(a.base, c.base) and torch.equal(a.equi, c.equi)
        images, others = torch.cat([a.base, a.equi]), torch.cat([b.base, b.equi])
        assert len(a.equi) == 3 and not (images == others).flatten(1).all(1).any()
    images = torch.cat([x for view in first for x in (view.base, view.equi)]).flatten(1)
    assert len(images.unique(dim=0)) == 24  # of 12 equal images, b1 and b2, in two views


def test_without_photometry_the_images_are_those_of_the_pipeline(crops):
    for view in preprocessor(photometry=[[], []])(batch(crops))['inputs']:
        images = to_rgb(crops[:12]).float()
        kept = [i for i in range(12) if i not in (2, 5, 7)]
        assert torch.equal(view.base, images[kept])
        assert torch.equal(view.equi, images[[2, 5, 7]])  # resized with weights of 0 and 1


def test_mixed_precision_does_not_touch_it(crops):
    images = to_rgb(crops[:8]).float()
    photometry = Photometry(POLICIES[0])
    seed(1)
    expected = photometry(images)
    seed(1)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(photometry(images), expected)  # by the same operations


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(photometry=[[dict(type='Rotate', angle=30.0)], []]), 'Rotate cannot run on the'),
        (dict(photometry=POLICIES[:1]), 'photometry has 1 lists, but a batch 2 views'),
        (dict(photometry=[[dict(type='GaussianBlur', magnitude_range=(0, 2))]] * 2), "std='inf'"),
        (dict(photometry=[[dict(type='Solarize', magnitude_range=(0, 256))]] * 2), "std='inf'"),
    ],
)
def test_bad_input_is_one_sentence(options, message, crops):
    with pytest.raises(ValueError, match=message) as error:
        preprocessor(**options)(batch(crops))
    assert '\n' not in str(error.value)


def test_thresholds_of_solarization_are_drawn_for_each_image():
    """Uniform between 64 and 192, as MMPretrain's: of grey values 128, half are inverted."""
    transform = dict(type='Solarize', magnitude_range=(64, 192), magnitude_std='inf', prob=1.0)
    seed(0)
    images = Photometry([transform])(torch.full((4000, 3, 1, 1), 128.0))
    inverted = (images == 127).flatten(1).all(dim=1)
    assert (inverted | (images == 128).flatten(1).all(dim=1)).all()
    assert abs(inverted.double().mean() - 0.5) < 5 * 0.5 / 4000**0.5
