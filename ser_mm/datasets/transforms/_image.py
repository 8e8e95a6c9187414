"""The images that faster transforms take."""

from typing import Any

import numpy as np


def image_of(transform: Any, results: dict, any_channels: bool = False) -> np.ndarray:
    """The image of ``results``.

    Args:
        transform (BaseTransform): Who asks.
        results (dict): With ``img``.
        any_channels (bool): Whether float32 may have other channels than three. Defaults to False.

    Returns:
        np.ndarray: uint8, (H, W, 3); or float32, (H, W, C), as ``LoadChannels`` gives it.

    Raises:
        ValueError: If the image is another array.
    """
    image = results['img']
    if image.dtype == np.float32 and image.ndim == 3 and (any_channels or image.shape[2] == 3):
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        name = type(transform).__name__
        if image.dtype == np.float32 and image.ndim == 3:
            raise ValueError(
                f'{name}: img has {image.shape[2]} channels, and colours have three; leave it out, '
                'or set saturation=0, hue=0 of FastColorJitter.'
            )
        raise ValueError(
            f'{name}: img is {image.dtype} of shape {image.shape}, and must be uint8 of (H, W, 3); '
            f"load it with color_type='color', to_float32=False, or use {name[4:]}."
        )
    return image
