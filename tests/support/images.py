"""Small images on disk."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image


def write_images(root, *names, side=64):
    """Write an image for each name, a path below ``root``; returns their paths."""
    rng = np.random.default_rng(0)
    paths = [Path(root, name) for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format='PNG')
    return paths


def write_deep_images(folder, count, channels, dtype='uint16'):
    """Write TIFFs 0.tif, 1.tif, ... of odd sizes and any channels; returns their values."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    most = 255 if dtype == 'uint8' else 4095
    images = []
    for number in range(count):
        shape = (*rng.integers(60, 90, 2), channels)
        images.append((most * rng.beta(2, 2 + np.arange(channels), shape)).astype(dtype))
        kept = images[-1][..., 0] if channels == 1 else images[-1]
        options = {} if channels == 1 else dict(planarconfig='contig')
        tifffile.imwrite(folder / f'{number}.tif', kept, photometric='minisblack', **options)
    return images
