"""Faster photometry: MMPretrain's, by the level and in order."""

import colorsys

import numpy as np
import pytest

import ser_mm.datasets.transforms.fast_photometry as photometry
from ser_mm.datasets import FastColorJitter
from tests.support.fast_views import build, check_within, jitter, pairs, small

GREY = dict(type='FastRandomGrayscale', keep_channels=True, channel_weights=(0.114, 0.587, 0.2989))
# Levels: 1 where a fraction is cut off that is known to 0.4 (a weighted mean that is itself off by
# 1 times a factor that is off 1 by 0.4); for the blur, 1/2 for each time that Pillow rounds, six.
STEPS = {
    'brightness': (jitter(brightness=0.4), 1),
    'contrast': (jitter(contrast=0.4), 1),
    'saturation': (jitter(saturation=0.4), 1),
    'grey': (GREY | dict(prob=0.7), 1),
    'solarize': (dict(type='FastSolarize', thr=128, prob=0.7), 0),
    'solarize, drawn': (
        dict(type='FastSolarize', magnitude_range=(0, 256), magnitude_std='inf', prob=0.7),
        0,
    ),
    'blur': (
        dict(type='FastGaussianBlur', magnitude_range=(0.1, 2), magnitude_std='inf', prob=0.7),
        3,
    ),
    'wide blur': (dict(type='FastGaussianBlur', radius=7.5, prob=1.0), 3),
    'no blur': (dict(type='FastGaussianBlur', radius=0, prob=1.0), 0),
}


@pytest.mark.parametrize('name', STEPS)
def test_photometry_is_that_of_mmpretrain(name):
    transform, levels = STEPS[name]
    check_within(levels, transform)


@pytest.mark.parametrize('turns', [-0.5, -0.1, 0.001, 0.04, 0.1, 0.5])
def test_hues_are_within_a_step_of_the_exact_ones(turns):
    """Half of a step each for writing and reading it, and for saturation and the colour."""
    colours = np.random.default_rng(0).integers(0, 256, (25, 40, 3), np.uint8)
    ours = build(jitter(hue=(turns, turns)))(dict(img=colours))['img']
    for colour, found in zip(colours.reshape(-1, 3), ours.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colour[::-1] / 255))
        exact = colorsys.hsv_to_rgb((hue + int(255 * turns) / 255) % 1, saturation, value)
        off = np.abs(255 * np.array(exact)[::-1] - found).max()
        assert off <= 6 * np.ptp(colour.astype(int)) * (0.5 / 256 + 0.5 / 255) + 0.5 + 0.5 + 0.5


@pytest.mark.parametrize(
    'name, fault',
    [
        ('brightness', jitter(brightness=0.35)),
        ('contrast', jitter(contrast=(0.6, 1.3))),
        ('saturation', jitter(saturation=(0.7, 1.4))),
        ('grey', GREY | dict(prob=0.7, channel_weights=(0.2989, 0.587, 0.114))),
        ('solarize', dict(type='FastSolarize', thr=127, prob=0.7)),
        ('blur', STEPS['blur'][0] | dict(magnitude_range=(0.1, 1.6))),
        ('wide blur', dict(type='FastGaussianBlur', radius=7.0, prob=1.0)),
    ],
)
def test_photometry_of_another_kind_would_be_seen(name, fault):
    transform, levels = STEPS[name]
    with pytest.raises(AssertionError):
        check_within(levels, fault, transform)


@pytest.mark.parametrize('hue', [0.1, 0.5])
def test_hues_are_off_by_their_steps(hue):
    """A colour goes through six times its range in a turn; both turn int(255 * hue) 255ths of one.

    Ours is rounded twice, to 256ths and 255ths; Pillow's is cut off to 255ths, and loses one where
    it passes red, as it counts to 256. A 255th of saturation, a level or less, is cut off by Pillow
    and rounded by OpenCV; so is the colour in the end, by tables that are good for half a level.
    """
    colours = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    means = []
    for image, ours, theirs in pairs(jitter(hue=hue), jitter(hue=hue), [*small(), colours], 4):
        turn = 0.5 / 256 + 0.5 / 255 + 2 / 255
        spread = np.ptp(image.astype(int), axis=2, keepdims=True)
        off = np.abs(ours - theirs)
        assert (off <= 6 * spread * turn + 1.5 + 1.5 + 0.5).all()
        means.append((ours - theirs).mean())
    assert np.abs(means).max() < 1  # and they are off to both sides


def check_order(transform):
    """Same order, same factors. A step is off by 1, and by 1.8 times what the one before was and
    0.4: its factor of 1.4, and 0.4 for the mean or the grey it works with. Three are off by 5.5."""
    check_within(5, transform, jitter(brightness=0.4, contrast=0.4, saturation=0.4))


def test_jitter_changes_in_the_order_of_mmpretrain(monkeypatch):
    transform = build(jitter(brightness=0.4, contrast=0.4, saturation=0.4))
    check_order(transform)
    brightness, contrast, *rest = photometry._JITTER
    monkeypatch.setattr(photometry, '_JITTER', (contrast, brightness, *rest))
    with pytest.raises(AssertionError):
        check_order(transform)


class Backwards(FastColorJitter):
    def _rand_params(self):
        order, *factors = super()._rand_params()
        return order[::-1], *factors


def test_jitter_in_another_order_would_be_seen():
    with pytest.raises(AssertionError):
        check_order(Backwards(0.4, 0.4, 0.4))
