"""The images that faster transforms take."""

from typing import Any

import numpy as np


def image_of(transform: Any, results: dict) -> np.ndarray:
    """The image of ``results``.

    Args:
        transform (BaseTransform): Who asks.
        results (dict): With ``img``.

    Returns:
        np.ndarray: uint8, (H, W, 3).

    Raises:
        ValueError: If the image is another array.
    """
    image = results['img']
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        name = type(transform).__name__
        raise ValueError(
            f'{name}: img is {image.dtype} of shape {image.shape}, and must be uint8 of (H, W, 3); '
            f"load it with color_type='color', to_float32=False, or use {name[4:]}."
        )
    return image
