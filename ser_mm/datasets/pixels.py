"""The values of image files as they are: all channels, all bits; and what they are like."""

import io
from collections.abc import Iterable

import cv2
import numpy as np
import tifffile

TYPES = 'uint8 uint16 uint32 int8 int16 int32 float16 float32 float64'.split()
"""Of the values of images, as NumPy calls them."""

_SAME = 1e-11
"""Deviation, relative to the mean, that rounding makes of equal values: float64's 1e-16 times the
number of values, or less."""

_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
_WHOLE = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR
_VALUES = 20_000
"""Values of a channel that are looked at in one image, about."""


def read_pixels(content: bytes, channels: int | None = None) -> np.ndarray:
    """Read an image with all of its channels and bits.

    TIFFs are read by tifffile, or by OpenCV where compression or colours need it, and
    other formats by OpenCV. Palettes and CMYK become RGB. EXIF orientation is followed where
    OpenCV does, of 4.12 not in WebP, and not in a PNG of which four channels are asked for.
    Transparency is left out, unless it is the last of the channels that are asked for. Of several
    pages of 8 bits the first is read.

    Args:
        content (bytes): The file.
        channels (int, optional): That are asked for; the image may have others. Defaults to None.

    Returns:
        np.ndarray: (H, W, C), of one of :data:`TYPES`, colours in the order RGB.

    Raises:
        ValueError: If it cannot be read, or has pages of more bits; what follows the name of the
            file in a sentence that says what to do.
    """
    values, why = None, 'is no image that can be read; write it anew'
    if content[:4] in _TIFF:
        try:
            values = _read_tiff(content, channels)
        except _Refused:
            raise
        except Exception as error:  # of many types, by what is damaged
            why = f'is no TIFF that can be read ({error}); write it without compression, say'
    if values is None:
        array = np.frombuffer(content, np.uint8)
        try:
            values = cv2.imdecode(array, cv2.IMREAD_UNCHANGED if channels == 4 else _WHOLE)
        except cv2.error:
            values = None
        if values is None:
            raise ValueError(why)
        values = values.reshape(*values.shape[:2], -1)
        if values.shape[2] > 2:
            values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    if values.dtype.name not in TYPES:
        raise ValueError(f'has values of type {values.dtype}; write them as {", ".join(TYPES)}')
    return values


class _Refused(ValueError):
    """Not to be tried by another reader."""


def _read_tiff(content: bytes, channels: int | None) -> np.ndarray | None:
    """(H, W, C), or None for what OpenCV knows better."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        series = tiff.series[0]
        page = series.keyframe
        turned = page.tags.get('Orientation')
        if (
            page.photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
            or page.bitspersample < 8
        ):
            return None
        sides = dict(zip(series.axes, series.shape, strict=True))
        others = {axis for axis, side in sides.items() if side > 1 and axis not in 'YX'}
        if not others <= {'S', 'C'} or len(others) > 1:
            if page.dtype == np.uint8:
                return None
            raise _Refused(
                f'has {len(tiff.pages)} pages; write each as a file, or all as the channels of an '
                "image: tifffile.imwrite(FILE, array, photometric='minisblack', "
                "planarconfig='separate')"
            )
        values = series.asarray()
        order = [series.axes.index(axis) for axis in ('Y', 'X', *others)]
        rest = [i for i in range(values.ndim) if i not in order]
        values = values.transpose(*order, *rest).reshape(sides['Y'], sides['X'], -1)
        # 1 and 2 are transparency (TIFF 6.0, ExtraSamples).
        extra = [int(kind) for kind in page.extrasamples]
        if extra and extra[-1] in (1, 2) and values.shape[2] != channels:
            values = values[..., :-1]
        # TIFF 6.0, Orientation: from 5 on rows are columns; 2 to 4 and 6 to 8 begin at other ends.
        side = turned.value if turned else 1
        if side in (5, 6, 7, 8):
            values = values.swapaxes(0, 1)
        return values[:: -1 if side in (3, 4, 7, 8) else 1, :: -1 if side in (2, 3, 6, 7) else 1]


def check_finite(values: np.ndarray) -> None:
    """Check that all values of an image are numbers.

    Args:
        values (np.ndarray): Of any shape.

    Raises:
        ValueError: If some are infinite or no number; what follows the name of the file.
    """
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        raise ValueError('has values that are infinite or no number; replace them in the file')


def fit_channels(values: np.ndarray, channels: int, dtype: str) -> np.ndarray:
    """Let an image have a number of channels; grey becomes three equal ones.

    Args:
        values (np.ndarray): (H, W, C).
        channels (int): Wanted.
        dtype (str): Of :data:`TYPES`, that its values have to be of.

    Returns:
        np.ndarray: (H, W, channels).

    Raises:
        ValueError: If it has another number of channels, values of another type, or some that are
            infinite or no number; what follows the name of the file in a sentence.
    """
    if values.dtype.name != dtype:
        raise ValueError(
            f'has values of {values.dtype.name}, and others {dtype}; write all as one type'
        )
    check_finite(values)
    if values.shape[2] == 1 and channels == 3:
        values = values.repeat(3, axis=2)
    if values.shape[2] != channels:
        raise ValueError(
            f'has {values.shape[2]} channels, and {channels} are taken; give images of one kind, '
            'or ask for another number'
        )
    return values


def measure(images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the values of each channel; images count the same, of whatever size.

    Of a large image every n-th row and column is looked at.

    Args:
        images (Iterable[np.ndarray]): (H, W, C) each; at least one.

    Returns:
        tuple[np.ndarray, np.ndarray]: Mean and standard deviation, (C,) each, float64; the latter
        is 1 for a channel that is the same everywhere.
    """
    parts = []
    for image in images:
        step = int(np.ceil(np.sqrt(image.shape[0] * image.shape[1] / _VALUES)))
        part = image[::step, ::step].astype(np.float64)
        parts.append((part.mean((0, 1)), part.var((0, 1))))
    means, variances = map(np.array, zip(*parts, strict=True))
    std = np.sqrt(variances.mean(0) + means.var(0))
    mean = means.mean(0)
    return mean, np.where(std > _SAME * abs(mean), std, 1.0)
