"""Images that three channels of 8 bits do not hold: what they have, and a config for them."""

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.config import Config, ConfigDict

from ser_mm.datasets.pixels import check_finite, fit_channels, measure, read_pixels
from ser_mm.datasets.transforms.load_channels import MEAN, STD
from ser_mm.evaluation.data import spaced_indices

_DEEP = ('.png', '.tif', '.tiff', '.pgm', '.ppm')  # the others have three channels of 8 bits
_PLAIN = (('uint8', 1), ('uint8', 3))
_LOOK = 32  # images, at most, that tell the kind of all
MEASURED = 1000
"""Images, at most, that mean and std are measured on."""


def measure_channels(files: Sequence[str], channels: int | None = None) -> dict[str, Any] | None:
    """What ``LoadChannels`` needs to know of images, if they are for it.

    Args:
        files (Sequence[str]): Images; mean and std are of all of these.
        channels (int, optional): That are asked for. Defaults to None: three for grey and colours,
            or as many as the images have.

    Returns:
        dict[str, Any] | None: Config of :class:`~ser_mm.datasets.LoadChannels`. None if nobody
        asked for ``channels`` and most images have one or three of 8 bits, transparency left out.

    Raises:
        ValueError: If images are of several kinds, or none can be read.
    """
    kinds: Counter[tuple[str, int]] = Counter()
    why = ''
    for i in spaced_indices(len(files), _LOOK):
        if channels is None and not files[i].lower().endswith(_DEEP):
            kinds['uint8', 3] += 1
            continue
        try:
            values = _read(files[i], channels)
            kinds[values.dtype.name, values.shape[2]] += 1
        except (OSError, ValueError) as error:
            why = f'{files[i]} {error}.'
    if not kinds:
        raise ValueError(why)
    (dtype, count), _ = kinds.most_common(1)[0]
    if channels is None:
        if sum(kinds[kind] for kind in _PLAIN) * 2 > kinds.total():
            return None  # as ever, with a warning of what is lost in the others
        channels = 3 if count == 1 else count

    def images() -> Iterator[np.ndarray]:
        for file in files:
            try:
                values = _read(file, channels)
            except (OSError, ValueError):
                continue  # skipped in training, too, with a warning
            try:
                yield fit_channels(values, channels, dtype)
            except ValueError as error:
                raise ValueError(f'{file} {error}.') from error

    unit = 255 if dtype == 'uint8' else 1
    mean, std = (x / unit for x in measure(images()))
    return dict(
        type='LoadChannels',
        channels=channels,
        dtype=dtype,
        # More digits than float32 has: a mean of 32 bits may be many deviations.
        mean=[float(f'{x:.12g}') for x in mean],
        std=[float(f'{x:.7g}') for x in std],
    )


def load_channels(cfg: Config, load: dict[str, Any]) -> None:
    """Let a config load images by ``LoadChannels``.

    Transforms of colours are left out where there are other channels than three.

    Args:
        cfg (Config): Of a pretraining, changed in place.
        load (dict[str, Any]): What :func:`measure_channels` returned.
    """
    channels = load['channels']
    datasets = [cfg.train_dataloader.dataset, *cfg.evaluation.values()]
    datasets += [cfg.test_dataloader.dataset] if cfg.get('test_dataloader') else []
    for dataset in datasets:
        dataset.pipeline = [ConfigDict(load), *dataset.pipeline[1:]]
        for step in dataset.pipeline:
            if step.type == 'ResizeEdge':  # whose Pillow takes 8 bits alone
                step.type = 'FastResizeEdge'
    for dataset in cfg.evaluation.values():
        dataset.pipeline[0].skip = False
    views = cfg.train_dataloader.dataset.pipeline[1]
    if channels != 3:
        views.transforms = [_without_colours(view) for view in views.transforms]
    pixels = dict(mean=[MEAN], std=[STD], to_rgb=channels == 3)
    algorithm = cfg.model.algorithm
    for place in (cfg, algorithm):
        place.data_preprocessor.update(pixels)
    backbone = algorithm.backbone
    if 'Timm' in backbone.type:
        backbone.model_args = dict(backbone.get('model_args') or {}, in_chans=channels)
    elif channels != 3:
        backbone.in_channels = channels


def describe(load: Mapping[str, Any]) -> str:
    """A sentence on what images have, and what follows.

    Args:
        load (Mapping[str, Any]): What :func:`measure_channels` returned.
    """
    channels, dtype = load['channels'], load['dtype']
    mean, std = (', '.join(f'{x:g}' for x in load[key]) for key in ('mean', 'std'))
    unit = ' / 255' if dtype == 'uint8' else ''
    colours = '' if channels == 3 else '; changes of colours, saturation and hue are left out'
    return (
        f'images of {channels} channel{"s" * (channels > 1)} of {dtype}{unit}, mean {mean}, std '
        f'{std}, as measured{colours}'
    )


def _read(file: str, channels: int | None) -> np.ndarray:
    """What raises is skipped in training, too."""
    values = read_pixels(fileio.get(file), channels)
    check_finite(values)
    return values


def _without_colours(steps: Sequence[MutableMapping]) -> list[MutableMapping]:
    kept = []
    for step in steps:
        name = step['type'].removeprefix('Fast')
        if name == 'RandomGrayscale':
            continue
        if name == 'ColorJitter':
            step.update(saturation=0.0, hue=0.0)
        if 'transforms' in step:
            step['transforms'] = _without_colours(step['transforms'])
        kept.append(step)
    return kept
