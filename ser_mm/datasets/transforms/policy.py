"""Telling crops, flips and photometry apart, to derive the policy of b2 from that of b1."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mmcv import transforms as mmcv_transforms
from mmcv.transforms import KeyMapper, RandomApply, RandomChoice, RandomFlip, RandomGrayscale
from mmpretrain.datasets import transforms as mmpretrain_transforms
from mmpretrain.datasets.transforms import AutoAugment, RandAugment
from mmpretrain.registry import TRANSFORMS


def _classes(module: Any, names: str) -> tuple[type, ...]:
    return tuple(getattr(module, name) for name in names.split() if hasattr(module, name))


CROPS = _classes(
    mmpretrain_transforms,
    'RandomResizedCrop RandomCrop ResizeEdge EfficientNetRandomCrop EfficientNetCenterCrop',
) + _classes(mmcv_transforms, 'CenterCrop Resize RandomResize RandomChoiceResize')
"""What cuts or resizes an image."""

GEOMETRY = (
    *CROPS,
    RandomFlip,
    AutoAugment,
    RandAugment,
    *_classes(mmpretrain_transforms, 'Rotate Shear Translate'),
    *_classes(mmcv_transforms, 'Pad'),
)
"""What moves the content of an image, or may, as automatic policies do."""

_TORCHVISION_GEOMETRY = re.compile(
    r'torchvision/.*(Flip|Rotation|Affine|Perspective|Crop|Resize|Elastic|AutoAugment|RandAugment)'
)

PHOTOMETRY = (
    RandomGrayscale,
    *_classes(
        mmpretrain_transforms,
        'AutoContrast Brightness ColorJitter ColorTransform Contrast Equalize GaussianBlur Invert '
        'Lighting Posterize Sharpness Solarize SolarizeAdd',
    ),
)
"""What changes the values of an image, and where they are not."""


def _kind(transform: Any) -> type | None:
    """The class of a transform, given as a config or built."""
    if not isinstance(transform, dict):
        return type(transform)
    kind = transform.get('type')
    kind = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
    return kind if isinstance(kind, type) else None  # torchvision's are functions


def _inner(transform: Any) -> list | None:
    """The transforms that one applies at times, or chooses from; None if it is no such."""
    kind = _kind(transform)
    if kind is None or not issubclass(kind, (RandomApply, RandomChoice, KeyMapper)):
        return None
    inner: Any = getattr(transform, 'transforms', None)
    if isinstance(transform, dict):
        inner = transform.get('transforms')
    if inner is None or issubclass(kind, (AutoAugment, RandAugment)):
        return None
    inner = getattr(inner, 'transforms', inner)  # a Compose
    if isinstance(inner, dict):
        return [inner]
    return [x for part in inner for x in (part if isinstance(part, (list, tuple)) else [part])]


def _is_all(transform: Any, classes: tuple[type, ...]) -> bool:
    inner = _inner(transform)
    if inner is not None:
        return all(_is_all(x, classes) for x in inner)
    kind = _kind(transform)
    if kind is None:
        return classes is GEOMETRY and bool(_TORCHVISION_GEOMETRY.match(_name(transform)))
    return issubclass(kind, classes)


def find_geometry(transforms: Sequence) -> Iterator[str]:
    """Names of the transforms that move content, nested ones included.

    Args:
        transforms (Sequence): Configs or transforms.

    Yields:
        str: The name of the class.
    """
    for transform in transforms:
        inner = _inner(transform)
        if inner is not None:
            yield from find_geometry(inner)
        elif _is_all(transform, GEOMETRY):
            yield _name(transform)


def derive_crop(views: Sequence[Sequence]) -> list:
    """The crop of b2: that of b1, once for both views (paper, Section 3).

    Args:
        views (Sequence[Sequence]): Pipelines of the two views, as configs or transforms.

    Returns:
        list: The crops and resizes that both pipelines begin with.

    Raises:
        ValueError: If the two begin with different ones.
    """
    crops = [_split(view)[0] for view in views]
    if repr(crops[0]) != repr(crops[1]):
        names = ' and '.join(', '.join(map(_name, crop)) or 'none' for crop in crops)
        raise ValueError(
            'EquivariantViewPipeline: the first two of `views` differ in the crops that they begin '
            f'with ({names}) or in their arguments, and b2 needs one for both; give equi_crop.'
        )
    return crops[0]


def derive_photometry(views: Sequence[Sequence]) -> list[list]:
    """The photometry of b2: that of b1.

    Flips are left out, as the element of D4 takes their place.

    Args:
        views (Sequence[Sequence]): Pipelines of the two views, as configs or transforms: crops and
            resizes first, then photometry, flips anywhere.

    Returns:
        list[list]: The photometric transforms of each view.

    Raises:
        ValueError: If a transform is neither a leading crop, nor a flip, nor photometry. The
            message names it.
    """
    photometry = [_split(view)[1] for view in views]
    for v, transforms in enumerate(photometry):
        odd = next((x for x in transforms if not _is_all(x, PHOTOMETRY)), None)
        if odd is not None:
            raise ValueError(
                f'EquivariantViewPipeline: {_name(odd)} in views[{v}] is neither a leading crop, a '
                'flip nor known photometry, so the policy of b2 cannot be derived; give equi_crop '
                'and equi_views.'
            )
    return photometry


def _split(view: Sequence) -> tuple[list, list]:
    """The leading crops of a pipeline, and the rest without flips."""
    rest = [x for x in view if not _is_all(x, (RandomFlip,))]
    count = 0
    while count < len(rest) and _inner(rest[count]) is None and _is_all(rest[count], CROPS):
        count += 1
    return rest[:count], rest[count:]


def _name(transform: Any) -> str:
    if isinstance(transform, dict):
        inner = _inner(transform)
        around = f' of {", ".join(map(_name, inner))}' if inner else ''
        kind = transform.get('type')
        return (kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))) + around
    return type(transform).__name__
