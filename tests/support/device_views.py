"""Pieces of photographs, and the preprocessor that makes views of them."""

import functools

import numpy as np
import skimage.data
import torch

from ser_mm.models import SERDataPreprocessor

SIZE = 48
CROP = dict(type='RandomResizedCrop', scale=32, crop_ratio_range=(0.1, 1.0), backend='pillow')
FLIP = dict(type='RandomFlip', prob=0.5)
JITTER = dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
BLUR = dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=0.5)
SOLARIZE = dict(type='Solarize', thr=128, prob=0.5)
VIEWS = [[CROP, JITTER, BLUR, FLIP], [CROP, JITTER, SOLARIZE, FLIP]]
PIXELS = dict(mean=[0.0] * 3, std=[1.0] * 3, to_rgb=True)
LEVEL = 1e-3


@functools.cache
def pieces():
    """Pieces of photographs, uint8 (N, H, W, 3), in BGR order as pipelines load them."""
    rng = np.random.default_rng(0)
    out = []
    for name in ('astronaut', 'chelsea', 'coffee', 'rocket'):
        photo = getattr(skimage.data, name)()[::2, ::2]
        for _ in range(16):
            top, left = (rng.integers(side - SIZE) for side in photo.shape[:2])
            out.append(photo[top : top + SIZE, left : left + SIZE, ::-1])
    return np.stack(out)


def to_batch(images):
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2)


def preprocessor(**options):
    return SERDataPreprocessor(**{**dict(patch_size=8, views=VIEWS, **PIXELS), **options})


def make(images, seed=0, **options):
    torch.manual_seed(seed)
    batch = dict(inputs=to_batch(images), data_samples=None)
    return preprocessor(**options)(batch, training=True)['inputs']
