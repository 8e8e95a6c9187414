"""MMPretrain's photometry on uint8 images, by tables and OpenCV: same arguments, same draws.

Images are BGR, (H, W, 3), as the loaders of MMCV give them. Those of float32, as ``LoadChannels``
gives them, are neither rounded nor cut off, and may have other channels than three where colours
do not matter. Results of uint8 agree with Pillow's, in grey levels of 255 (derived and tested
in ``tests/datasets/test_fast_photometry.py``):

- brightness and contrast, saturation and grayscale within 1 each, solarization exactly;
- hue: both know it in steps of 1/255 of a turn, in which a fully saturated colour changes by 6.
  Here it is within one of the exact one, with Pillow within two, and three where it passes red;
- blur: Pillow's three boxes, which it rounds six times, within 3.
"""

from typing import Annotated, Any, Literal

import cv2
import mmcv
import numpy as np
from mmcv.transforms import RandomGrayscale
from mmpretrain.datasets.transforms import ColorJitter, GaussianBlur, Solarize
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import NaturalFloat, PositiveFloat, Share, ascending, checked, within
from ser_mm.datasets.transforms._image import image_of

Factor = NaturalFloat | Annotated[tuple[NaturalFloat, NaturalFloat], ascending]
_turn = Annotated[float, within(-0.5, 0.5)]
Turns = Annotated[float, within(0, 0.5)] | Annotated[tuple[_turn, _turn], ascending]
Strength = tuple[NaturalFloat, NaturalFloat]

# Where Pillow and MMCV cut a fraction off, OpenCV rounds. A whole number stays what it is.
_CUT_OFF = -0.498


@TRANSFORMS.register_module()
@checked
class FastColorJitter(ColorJitter):
    """MMPretrain's ``ColorJitter(backend='pillow')``, by tables and OpenCV.

    Args:
        brightness (float | tuple[float, float]): The factor is uniform in [1 - brightness, 1 +
            brightness], not below 0, or in the range. Defaults to 0: none.
        contrast (float | tuple[float, float]): Likewise. Defaults to 0.
        saturation (float | tuple[float, float]): Likewise. Defaults to 0.
        hue (float | tuple[float, float]): Turns, uniform in [-hue, hue] or in the range; within
            [-0.5, 0.5]. Defaults to 0.
        backend (str): 'pillow', as which it computes. Defaults to 'pillow'.
    """

    def __init__(
        self,
        brightness: Factor = 0.0,
        contrast: Factor = 0.0,
        saturation: Factor = 0.0,
        hue: Turns = 0.0,
        backend: Literal['pillow'] = 'pillow',
    ) -> None:
        super().__init__(brightness, contrast, saturation, hue, backend)

    def transform(self, results: dict) -> dict:
        """Jitter the colours.

        Args:
            results (dict): With ``img``.

        Returns:
            dict: With a new ``img``.
        """
        order, *factors = self._rand_params()
        colours = any(factors[step] is not None for step in _COLOURS)
        image = image_of(self, results, any_channels=not colours)
        for step in order:
            if factors[step] is not None:
                image = _JITTER[step](image, factors[step])
        results['img'] = image
        return results


@TRANSFORMS.register_module()
@checked
class FastRandomGrayscale(RandomGrayscale):
    """MMCV's ``RandomGrayscale(keep_channels=True)``, by OpenCV.

    Args:
        prob (float): Of doing so, 0 to 1. Defaults to 0.1.
        keep_channels (bool): True, as three equal channels are returned. Defaults to True.
        channel_weights (tuple[float, float, float]): Of the channels in the order of the image,
            BGR; divided by their sum. Defaults to (1.0, 1.0, 1.0).
    """

    def __init__(
        self,
        prob: Share = 0.1,
        keep_channels: bool = True,
        channel_weights: tuple[NaturalFloat, NaturalFloat, NaturalFloat] = (1.0, 1.0, 1.0),
    ) -> None:
        if not keep_channels or sum(channel_weights) <= 0:
            raise ValueError(
                f'FastRandomGrayscale: keep_channels={keep_channels}, channel_weights='
                f'{channel_weights}; it keeps channels, and weights them: set keep_channels=True '
                'and weights that are not all 0, or use RandomGrayscale.'
            )
        super().__init__(prob, keep_channels, channel_weights)

    def transform(self, results: dict) -> dict:
        """Make the image grey, at times.

        Args:
            results (dict): With ``img``.

        Returns:
            dict: With a new ``img``, if it was made grey.
        """
        image = image_of(self, results)
        if self._random_prob() < self.prob:
            weights = np.asarray(self.channel_weights, dtype=float)
            matrix = np.append(weights / weights.sum(), _cut_off(image))[None]
            results['img'] = cv2.cvtColor(cv2.transform(image, matrix), cv2.COLOR_GRAY2BGR)
        return results


@TRANSFORMS.register_module()
@checked
class FastGaussianBlur(GaussianBlur):
    """MMPretrain's ``GaussianBlur``, Pillow's boxes by OpenCV.

    Args:
        radius (float, optional): Deviation of the Gaussian in pixels, 0 for none. Defaults to
            None: drawn from ``magnitude_range``.
        prob (float): Of doing so, 0 to 1. Defaults to 0.5.
        magnitude_range (tuple[float, float], optional): Smallest and largest. Defaults to None.
        magnitude_std (float | str): 'inf' to draw uniformly from the range. Defaults to 0: take
            ``magnitude_level``; above 0 the deviation of a normal distribution around it.
        magnitude_level (float): Of ``total_level``, 0 for the smallest. Defaults to 10.
        total_level (float): Level of the largest. Defaults to 10.
    """

    def __init__(
        self,
        radius: NaturalFloat | None = None,
        prob: Share = 0.5,
        magnitude_range: Strength | None = None,
        magnitude_std: NaturalFloat | Literal['inf'] = 0.0,
        magnitude_level: NaturalFloat = 10,
        total_level: PositiveFloat = 10,
    ) -> None:
        _check_magnitude(self, 'radius', radius, magnitude_range)
        super().__init__(
            radius,
            prob,
            magnitude_range=magnitude_range,
            magnitude_std=magnitude_std,
            magnitude_level=magnitude_level,
            total_level=total_level,
        )

    def transform(self, results: dict) -> dict:
        """Blur the image, at times.

        Args:
            results (dict): With ``img``.

        Returns:
            dict: With a new ``img``, if it was blurred.
        """
        original = image = image_of(self, results, any_channels=True)
        if self.random_disable():
            return results
        box = _pillow_box(self.random_magnitude() if self.radius is None else self.radius)
        for _ in range(3):
            border = cv2.BORDER_REPLICATE
            image = cv2.sepFilter2D(image, cv2.CV_32F, box, box, borderType=border)
        if original.dtype == np.uint8:
            image = cv2.convertScaleAbs(image)
        results['img'] = image.reshape(original.shape)  # of one channel, too
        return results


@TRANSFORMS.register_module()
@checked
class FastSolarize(Solarize):
    """MMPretrain's ``Solarize``, by a table.

    Args:
        thr (float, optional): Grey level from which on values are inverted, 0 or more. Defaults
            to None: drawn from ``magnitude_range``.
        prob (float): Of doing so, 0 to 1. Defaults to 0.5.
        magnitude_range (tuple[float, float], optional): Smallest and largest. Defaults to None.
        magnitude_std (float | str): 'inf' to draw uniformly from the range. Defaults to 0: take
            ``magnitude_level``; above 0 the deviation of a normal distribution around it.
        magnitude_level (float): Of ``total_level``, 0 for the smallest. Defaults to 10.
        total_level (float): Level of the largest. Defaults to 10.
    """

    def __init__(
        self,
        thr: NaturalFloat | None = None,
        prob: Share = 0.5,
        magnitude_range: Strength | None = None,
        magnitude_std: NaturalFloat | Literal['inf'] = 0.0,
        magnitude_level: NaturalFloat = 10,
        total_level: PositiveFloat = 10,
    ) -> None:
        _check_magnitude(self, 'thr', thr, magnitude_range)
        super().__init__(
            thr,
            prob,
            magnitude_range=magnitude_range,
            magnitude_std=magnitude_std,
            magnitude_level=magnitude_level,
            total_level=total_level,
        )

    def transform(self, results: dict) -> dict:
        """Invert what is bright, at times.

        Args:
            results (dict): With ``img``.

        Returns:
            dict: With a new ``img``, if it was solarized.
        """
        image = image_of(self, results, any_channels=True)
        if self.random_disable():
            return results
        threshold = self.random_magnitude() if self.thr is None else self.thr
        if image.dtype == np.uint8:
            results['img'] = cv2.LUT(image, mmcv.solarize(_LEVELS, threshold))
        else:
            results['img'] = mmcv.solarize(image, threshold)
        return results


def _check_magnitude(transform: Any, name: str, value: float | None, bounds: Any) -> None:
    if (value is None) == (bounds is None):
        raise ValueError(
            f'{type(transform).__name__}: {name}={value} and magnitude_range={bounds}; give one '
            'of both.'
        )


_LEVELS = np.arange(256, dtype=np.uint8)


def _cut_off(image: np.ndarray) -> float:
    return _CUT_OFF if image.dtype == np.uint8 else 0.0


def _blend(grey: float, image: np.ndarray, factor: float) -> np.ndarray:
    """From one grey level to the image, and beyond: Pillow's ``blend``, level by level."""
    if image.dtype != np.uint8:
        return np.float32(grey) + np.float32(factor) * (image - np.float32(grey))
    table = np.float32(grey) + np.float32(factor) * (_LEVELS.astype(np.float32) - grey)
    return cv2.LUT(image, table.clip(0, 255).astype(np.uint8))


def _change_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend(0, image, factor)


def _change_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    if image.shape[2] != 3:  # no colours, of which green would count the most
        return _blend(image.mean(dtype=float), image, factor)
    mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean(dtype=float)
    return _blend(int(mean + 0.5) if image.dtype == np.uint8 else mean, image, factor)


def _change_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(image, factor, grey, 1 - factor, _cut_off(image))


def _turn_hue(image: np.ndarray, turns: float) -> np.ndarray:
    if image.dtype != np.uint8:
        low = image.min()  # which changes no hue, and HSV begins at 0
        hsv = cv2.cvtColor(image - low, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0] + 360 * turns) % 360
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR) + low
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)
    # As many steps as Pillow takes. OpenCV writes 256 steps a turn, and reads 255.
    turned = (_LEVELS / 256 + int(255 * turns) / 255) % 1
    table = np.rint(255 * turned).astype(np.uint8)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), table), hsv, 0)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)


_JITTER = (_change_brightness, _change_contrast, _change_saturation, _turn_hue)
_COLOURS = (2, 3)


def _pillow_box(sigma: float) -> np.ndarray:
    """One of the three boxes that are Pillow's approximation of a Gaussian, (taps,).

    It reaches ``r`` pixels to each side, and covers the last one in part, such that the three
    have the variance of the Gaussian (Pillow, ``src/libImaging/BoxBlur.c``).
    """
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    r = whole + part / (6 * (variance - (whole + 1) ** 2))
    reach = int(np.ceil(r))
    return np.clip(r + 1 - np.abs(np.arange(-reach, reach + 1)), 0, 1) / (2 * r + 1)
