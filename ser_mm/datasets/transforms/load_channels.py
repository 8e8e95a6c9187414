import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio
from mmengine.logging import print_log
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Positive, PositiveFloat, checked, filled
from ser_mm.datasets.pixels import TYPES, fit_channels, read_pixels

MEAN, STD = 127.5, 64.0
"""What mean and deviation of each channel become, for preprocessors."""


@TRANSFORMS.register_module()
@checked
class LoadChannels(BaseTransform):
    """Load an image with all of its channels and bits, as float32.

    For what ``LoadReadableImage`` would make three channels of 8 bits. Each channel is scaled so
    that its mean becomes 127.5 and its standard deviation 64: photometry finds values about those
    of 8 bits, and preprocessors take ``mean=[127.5], std=[64.0]``, one number for all channels.
    Nothing is rounded or cut off. A file that cannot be read, or has other channels or another
    type of values, is skipped with a warning that names it.

    **Added keys**: img, img_shape, ori_shape

    Args:
        channels (int): Of the image. Grey becomes three equal ones; transparency is left out,
            unless it is the last of them.
        dtype (str): Type of the values in the files, as NumPy calls it: 'uint16', 'float32', ...
        mean (Sequence[float]): Of the values of each channel, RGB if these are three, in units of
            the files, or of 255 for uint8.
        std (Sequence[float]): Likewise their deviations.
        skip (bool): Whether a file that does not do is skipped; otherwise it is an error, as
            evaluations need it. Defaults to True.

    Raises:
        ValueError: If ``mean`` or ``std`` has not one number for each channel.

    Example:
        >>> load = LoadChannels(channels=1, dtype='uint16', mean=[812.0], std=[240.5])
        >>> load(dict(img_path='x.tif'))['img']  # (H, W, 1)
    """

    def __init__(
        self,
        channels: Positive,
        dtype: Literal[tuple(TYPES)],  # type: ignore[valid-type]
        mean: Annotated[Sequence[float], filled],
        std: Annotated[Sequence[PositiveFloat], filled],
        skip: bool = True,
    ) -> None:
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f'LoadChannels: mean={list(mean)}, std={list(std)}; give one number of each for '
                f'channels={channels}.'
            )
        self.channels, self.dtype, self.skip = channels, dtype, skip
        self.mean, self.std = list(mean), list(std)
        unit = 255 if dtype == 'uint8' else 1
        self._mean, self._scale = unit * np.array(mean), STD / (unit * np.array(std))

    def transform(self, results: dict) -> dict | None:
        """Load ``img_path``.

        Args:
            results (dict): With ``img_path``.

        Returns:
            dict | None: With ``img``, (H, W, channels), float32, BGR if these are three,
            ``img_shape`` and ``ori_shape``; None for a file that is skipped.

        Raises:
            OSError, ValueError: Of such a file with ``skip=False``.
        """
        path = results['img_path']
        try:
            values = read_pixels(fileio.get(path), self.channels)
            results['img'] = self.scale(values)
        except Exception as error:  # of many types, by place and format
            if not self.skip:
                raise
            print_log(f'Skipped an image: {path} {error}', 'current', logging.WARNING)
            return None
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Scale the values of an image.

        Args:
            values (np.ndarray): (H, W, C) as in the files, RGB if C is 3.

        Returns:
            np.ndarray: What :meth:`transform` gives.

        Raises:
            ValueError: If it has other channels or another type of values.
        """
        values = fit_channels(values, self.channels, self.dtype)
        # float32 holds all values of 16 bits.
        exact = np.result_type(values.dtype, np.float32)
        image = np.subtract(values, self._mean, dtype=exact)
        image *= self._scale
        image += MEAN
        if self.channels == 3:
            image = image[..., ::-1]
        return np.ascontiguousarray(image, np.float32)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(channels={self.channels}, dtype={self.dtype!r}, '
            f'mean={self.mean}, std={self.std})'
        )
