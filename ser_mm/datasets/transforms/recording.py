"""What the random transforms of a view drew, without a change to their types or their draws."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmcv.transforms import CenterCrop, Compose, RandomApply, RandomFlip, RandomGrayscale, Resize
from mmpretrain.datasets.transforms import (
    ColorJitter,
    GaussianBlur,
    RandomResizedCrop,
    ResizeEdge,
    Solarize,
)

from ser_mm.draws import COLUMNS

_FIXED = (CenterCrop, Resize, ResizeEdge)
_RECORDED = (RandomResizedCrop, RandomFlip, ColorJitter, RandomGrayscale, GaussianBlur, Solarize)
_SHARED = (RandomResizedCrop, ColorJitter, RandomGrayscale)
"""What images of a pair have in common (STL, arXiv 2501.08712, Section 3.3)."""
_ORDER = [COLUMNS.index(f'order_{i}') for i in range(4)]


class RecordedView:
    """The pipeline of a view, and what it drew for an image.

    Draws of MMPretrain's transforms are kept by MMCV's ``cache_randomness`` while their cache is
    on: same images, same stream of random numbers as without.

    Args:
        pipeline (Compose): Crops and resizes first, then photometry and a horizontal flip, each
            once at most, nested in ``RandomApply`` or not.

    Raises:
        ValueError: If a transform is not one of those whose draws are known, or stands where they
            are not. The message names it.
    """

    def __init__(self, pipeline: Compose) -> None:
        self.pipeline = pipeline
        self.kinds = _by_kind(pipeline.transforms)
        self.crop = self.kinds.get(RandomResizedCrop)
        if self.crop is not None and self.crop not in pipeline.transforms:
            raise ValueError(
                f'EquivariantViewPipeline: {type(self.crop).__name__} is in RandomApply, where the '
                'size of the image that it crops is not known; take it out.'
            )
        self.all = list(_walk(pipeline.transforms))
        self.last: tuple[tuple[int, int], list[dict]] | None = None

    def __call__(self, results: dict, as_before: bool = False) -> tuple[dict, np.ndarray]:
        """Make the view, and tell what was drawn for it.

        Args:
            results (dict): With ``img``, (H, W, 3).
            as_before (bool): Crop, jitter and grayscale as the image before, whose crop is taken
                in shares of height and width. Defaults to False.

        Returns:
            tuple[dict, np.ndarray]: What the pipeline returns, and a row of
            :data:`ser_mm.draws.COLUMNS`, float32.
        """
        kept = self.last if as_before else None
        with _caching(self.all, kept and kept[1]):
            size = results['img'].shape[:2]
            for transform in self.pipeline.transforms:
                if transform is self.crop:
                    size = results['img'].shape[:2]
                    if kept:
                        _rescale(vars(transform)['_cache'], kept[0], size)
                results = transform(results)
            self.last = size, [dict(x._cache) if _is_shared(x) else {} for x in self.all]
            return results, self._row(size)

    def __repr__(self) -> str:
        return repr(self.pipeline)

    def _row(self, size: tuple[int, int]) -> np.ndarray:
        """What lies in the caches, of a crop from an image of this height and width."""
        row = dict.fromkeys(COLUMNS, 0.0)
        row.update(height=1.0, width=1.0)
        drawn = {kind: vars(x).get('_cache', {}) for kind, x in self.kinds.items()}
        box = drawn.get(RandomResizedCrop, {}).get('rand_crop_params')
        if box is not None:
            top, left, height, width = box
            row.update(top=top / size[0], height=height / size[0])
            row.update(left=left / size[1], width=width / size[1])
        row.update(flip=drawn.get(RandomFlip, {}).get('_choose_direction') is not None)
        order = np.arange(4)
        jitter = drawn.get(ColorJitter, {}).get('_rand_params')
        if jitter is not None:
            order, *factors = jitter
            row.update(jitter=1.0)
            for name, factor in zip(
                ('brightness', 'contrast', 'saturation', 'hue'), factors, strict=True
            ):
                bounds = getattr(self.kinds[ColorJitter], name)
                if factor is not None:
                    row[name] = (factor - (name != 'hue')) / (bounds[1] - bounds[0] or 1)
        grayscale = drawn.get(RandomGrayscale, {}).get('_random_prob')
        if grayscale is not None:
            row.update(gray=grayscale < self.kinds[RandomGrayscale].prob)
        if not drawn.get(GaussianBlur, {}).get('random_disable', True):
            blur = self.kinds[GaussianBlur]
            sigma = drawn[GaussianBlur].get('random_magnitude', blur.radius)
            largest = blur.radius if blur.magnitude_range is None else max(blur.magnitude_range)
            row.update(blur=1.0, sigma=sigma / (largest or 1))
        if not drawn.get(Solarize, {}).get('random_disable', True):
            threshold = drawn[Solarize].get('random_magnitude', self.kinds[Solarize].thr)
            row.update(solarize=1 - threshold / 256)
        values = np.array([row[name] for name in COLUMNS], dtype=np.float32)
        values[_ORDER] = np.asarray(order) / 3
        return values


@contextmanager
def random_numbers_apart() -> Iterator[None]:
    """Draw from streams of random numbers that start where the streams are, and leave those."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed = np.random.randint(2**31)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _caching(transforms: Sequence[Any], kept: Sequence[dict] | None) -> Iterator[None]:
    """Let transforms keep their draws in MMCV's ``_cache``, and repeat those that were kept."""
    for transform, draws in zip(transforms, kept or [{}] * len(transforms), strict=True):
        transform._cache_enabled = True
        transform._cache = dict(draws)
    try:
        yield
    finally:
        for transform in transforms:
            vars(transform).pop('_cache_enabled', None)
            vars(transform).pop('_cache', None)


def _is_shared(transform: Any) -> bool:
    if isinstance(transform, RandomApply):
        return any(map(_is_shared, transform.transforms.transforms))
    return isinstance(transform, _SHARED)


def _rescale(draws: dict, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Take a crop of an image of one size to an image of another."""
    box = draws['rand_crop_params']
    height, width = (max(round(box[2 + i] * new[i] / old[i]), 1) for i in range(2))
    top, left = (
        min(round(box[i] * new[i] / old[i]), new[i] - side)
        for i, side in enumerate((height, width))
    )
    draws['rand_crop_params'] = top, left, height, width


def _walk(transforms: Iterable[Any]) -> Iterator[Any]:
    """Transforms and those that they apply at times."""
    for transform in transforms:
        yield transform
        if isinstance(transform, RandomApply):
            yield from _walk(transform.transforms.transforms)


def _by_kind(transforms: Iterable[Any]) -> dict[type, Any]:
    """The recorded transforms by their class."""
    found: dict[type, Any] = {}
    for transform in _walk(transforms):
        kind = next((k for k in _RECORDED if isinstance(transform, k)), None)
        name = type(transform).__name__
        if kind is None and not isinstance(transform, (RandomApply, *_FIXED)):
            raise ValueError(
                f'EquivariantViewPipeline: what {name} draws cannot be recorded; make the views of '
                f'{", ".join(k.__name__ for k in (*_RECORDED, RandomApply, *_FIXED))}.'
            )
        if kind in found:
            raise ValueError(
                f'EquivariantViewPipeline: {name} stands twice in a view, and one set of its draws '
                'is recorded; leave one out.'
            )
        if kind is RandomResizedCrop and found:
            raise ValueError(
                f'EquivariantViewPipeline: {name} comes after {next(iter(found)).__name__}, but '
                'the record gives the crop in the image as it was; let views begin with it.'
            )
        if kind is RandomFlip and transform.direction not in ('horizontal', ['horizontal']):
            raise ValueError(
                f'EquivariantViewPipeline: RandomFlip.direction={transform.direction!r} cannot be '
                "recorded; choose direction='horizontal'."
            )
        if kind is not None:
            found[kind] = transform
    return found
