"""Small images on disk."""

from pathlib import Path

import numpy as np
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
