"""Photographs, and faster transforms beside those of MMPretrain on the same random numbers."""

import random

import cv2
import numpy as np
import skimage.data
from mmengine.registry import init_default_scope
from mmpretrain.registry import TRANSFORMS

from tests.support.policies import of_mmpretrain

init_default_scope('mmpretrain')
PHOTOS = [
    np.ascontiguousarray(getattr(skimage.data, name)()[..., ::-1])
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket')
]


def seed(number):
    random.seed(number)
    np.random.seed(number)


def build(config):
    return TRANSFORMS.build(config) if isinstance(config, dict) else config


def pairs(transform, config, images, draws=1):
    """Images by a faster transform and by MMPretrain's, each on the same random numbers."""
    transform, other = build(transform), build(of_mmpretrain(config))
    for i in range(draws * len(images)):
        found = []
        for make in (transform, other):
            seed(i)
            image = images[i % len(images)]
            results = make(dict(img=image.copy()))
            found += [results['img'], (random.random(), np.random.rand())]
        assert found[1] == found[3]  # as many random numbers
        assert found[0].shape == found[2].shape and found[0].dtype == np.uint8
        yield image, found[0].astype(int), found[2].astype(int)


def small(side=96):
    """Photographs of a size on which Pillow is fast enough, with whole objects."""
    return [cv2.resize(x, (side + 8, side), interpolation=cv2.INTER_AREA) for x in PHOTOS]


def crop(**options):
    return dict(type='FastRandomResizedCrop', scale=(64, 56), backend='pillow') | options


def jitter(**options):
    return dict(type='FastColorJitter', **options)


def check_within(levels, transform, config=None):
    for _, ours, theirs in pairs(transform, config or transform, small(), draws=3):
        assert np.abs(ours - theirs).max() <= levels
