"""Views made on the device from images of one size: crop, flip, photometry, elements of D4."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmcv.transforms import RandomFlip
from mmpretrain.datasets.transforms import RandomResizedCrop
from mmpretrain.registry import TRANSFORMS
from torch import Tensor

from ser_mm.models.photometry import Photometry

_PART = 2**20  # values


class Crops(NamedTuple):
    """What is drawn of each image for a view, on the host.

    Attributes:
        boxes (Tensor): Top, left, height, width in pixels, (N, 4), int64.
        flips (Tensor): Whether it is mirrored left-right after that, (N,), bool.
    """

    boxes: Tensor
    flips: Tensor


class DeviceView:
    """The pipeline of a view, written as for MMPretrain, for batches of one size on any device.

    Each image gets draws of its own, from the distributions of MMPretrain's transforms and from
    torch's generator of the host, see :class:`~ser_mm.models.photometry.Photometry`. A crop is cut
    and resized by two products with matrices of weights, those of Pillow (``backend='pillow'``,
    antialiased, bilinear or bicubic) or of OpenCV (``backend='cv2'``, bilinear), which are not
    rounded to 8 bits in between. A flip is the same product with the columns in reverse.

    Args:
        transforms (Sequence[dict]): A ``RandomResizedCrop``, if any, then photometry, see
            ``Photometry``, and one ``RandomFlip`` at most, left-right, at any place.

    Raises:
        ValueError: If a transform is not one of these, or has another interpolation.

    Example:
        >>> crop = dict(type='RandomResizedCrop', scale=32, backend='pillow')
        >>> view = DeviceView([crop, dict(type='RandomFlip', prob=0.5)])
        >>> images = view(torch.rand(8, 3, 64, 64), view.draw(8, (64, 64)))  # (8, 3, 32, 32)
    """

    def __init__(self, transforms: Sequence[dict]) -> None:
        rest = list(transforms)
        self.crop = (
            TRANSFORMS.build(rest.pop(0)) if rest and _is(rest[0], RandomResizedCrop) else None
        )
        flips = [TRANSFORMS.build(x) for x in rest if _is(x, RandomFlip)]
        rest = [x for x in rest if not _is(x, RandomFlip)]
        if self.crop is not None:
            _check_crop(self.crop)
            self.kernel = _KERNELS[self.crop.backend, self.crop.interpolation]
        self.flip = _share_of_flips(flips)
        self.photometry = Photometry(rest) if rest else None

    def draw(self, n: int, size: tuple[int, int]) -> Crops:
        """Draw crops and flips.

        Args:
            n (int): Number of images.
            size (tuple[int, int]): Their height and width.

        Returns:
            Crops: On the host.
        """
        if self.crop is None:
            boxes = torch.tensor([[0, 0, *size]]).repeat(n, 1)
        else:
            boxes = draw_boxes(self.crop, n, size)
        return Crops(boxes, torch.rand(n) < self.flip if self.flip else torch.zeros(n).bool())

    def __call__(self, images: Tensor, crops: Crops) -> Tensor:
        """Make the view.

        Args:
            images (Tensor): RGB in [0, 255], float, (N, 3, H, W).
            crops (Crops): What :meth:`draw` returned for them.

        Returns:
            Tensor: Likewise, (N, 3, h, w) of the crop's size.
        """
        part = len(images)
        if images.device.type == 'cpu':  # parts that stay in its cache, with draws of their own
            part = min(part, max(1, _PART // max(images[0].numel(), 1))) if part else 1
        made = [
            self._make(x, Crops(*y))
            for x, *y in zip(images.split(part), *(x.split(part) for x in crops), strict=True)
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _make(self, images: Tensor, crops: Crops) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            if self.crop is None:
                images = resized_crop(images, crops, images.shape[-2:])
            else:
                images = resized_crop(images, crops, self.crop.scale, self.kernel)
        return self.photometry(images) if self.photometry else images

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the view of images of height and width ``size``."""
        return size if self.crop is None else tuple(self.crop.scale)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.crop}, {self.photometry}, flip={self.flip})'


def draw_boxes(crop: RandomResizedCrop, n: int, size: tuple[int, int]) -> Tensor:
    """Boxes by the law of MMPretrain's ``RandomResizedCrop``.

    Area and aspect ratio are drawn up to ``max_attempts`` times, until the box fits into the image;
    its place is uniform. Where none fits, it is the largest centred one of an allowed aspect ratio.

    Args:
        crop: A built ``RandomResizedCrop``.
        n (int): Number of boxes.
        size (tuple[int, int]): Height and width of the images.

    Returns:
        Tensor: Top, left, height, width, (n, 4), int64, on the host.
    """
    height, width = size
    u, v = torch.rand(2, n, crop.max_attempts, dtype=torch.float64)
    low, high = crop.crop_ratio_range
    area = (low + (high - low) * u) * height * width
    low, high = map(math.log, crop.aspect_ratio_range)
    aspect = torch.exp(low + (high - low) * v)
    sides = torch.stack([(area / aspect).sqrt().round(), (area * aspect).sqrt().round()], dim=-1)
    limit = torch.tensor(size, dtype=torch.float64)
    fits = ((sides > 0) & (sides <= limit)).all(-1)
    # The last attempt always succeeds.
    largest = _largest_box(crop, size).expand(n, 1, 2)
    sides = torch.cat([sides, largest], dim=1)
    fits = torch.cat([fits, torch.ones(n, 1, dtype=torch.bool)], dim=1)
    first = fits.int().argmax(1)
    sides = sides[torch.arange(n), first]
    places = (torch.rand(n, 2, dtype=torch.float64) * (limit - sides + 1)).floor()
    centred = ((limit - sides) / 2).floor()
    places = torch.where((first == crop.max_attempts)[:, None], centred, places)
    return torch.cat([places, sides], dim=1).long()


def _largest_box(crop: RandomResizedCrop, size: tuple[int, int]) -> Tensor:
    height, width = size
    low, high = min(crop.aspect_ratio_range), max(crop.aspect_ratio_range)
    if width / height < low:
        height = round(width / low)
    elif width / height > high:
        width = round(height * high)
    return torch.tensor([height, width], dtype=torch.float64)


class Kernel(NamedTuple):
    """How pixels are weighted that are resized.

    Attributes:
        weights (Callable): Of distances in pixels.
        reach (int): Beyond it weights are zero.
        antialias (bool): Whether it widens where the image shrinks.
    """

    weights: Callable[[Tensor], Tensor]
    reach: int
    antialias: bool


def _triangle(distances: Tensor) -> Tensor:
    return (1 - distances.abs()).clamp_(min=0)


def _cubic(distances: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, as in Pillow."""
    d = distances.abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2
    return torch.where(d < 1, near, far.masked_fill_(d >= 2, 0))


_KERNELS = {
    ('pillow', 'bilinear'): Kernel(_triangle, 1, True),
    ('pillow', 'bicubic'): Kernel(_cubic, 2, True),
    ('cv2', 'bilinear'): Kernel(_triangle, 1, False),
}
_BILINEAR = _KERNELS['cv2', 'bilinear']


def resized_crop(
    images: Tensor, crops: Crops, size: Sequence[int], kernel: Kernel = _BILINEAR
) -> Tensor:
    """Cut boxes out of images, and resize and flip them.

    Args:
        images (Tensor): In [0, 255], float, (N, C, H, W).
        crops (Crops): On the host.
        size (Sequence[int]): Height and width to resize to.
        kernel (Kernel): Weights. Defaults to those of OpenCV's bilinear interpolation.

    Returns:
        Tensor: In [0, 255], (N, C, h, w). Whole pixels come back as they are.
    """
    n, channels, height, width = images.shape
    top, left, rows, columns = crops.boxes.unbind(1)
    across = _resampling(left, columns, size[1], width, kernel, images.device, crops.flips)
    down = _resampling(top, rows, size[0], height, kernel, images.device)
    images = torch.bmm(images.reshape(n, channels * height, width), across.transpose(1, 2))
    images = images.view(n, channels, height, size[1]).transpose(1, 2)
    images = torch.bmm(down, images.reshape(n, height, channels * size[1])).clamp_(0, 255)
    return images.view(n, size[0], channels, size[1]).transpose(1, 2).contiguous()


def _resampling(
    starts: Tensor,
    lengths: Tensor,
    new: int,
    old: int,
    kernel: Kernel,
    device: torch.device,
    reverse: Tensor | None = None,
) -> Tensor:
    """Weights of ``old`` pixels in ``new`` ones, (N, new, old), of a piece of a line for each N."""
    # Known on the host, so that the shapes need no value of the device.
    widest = max(1.0, int(lengths.max()) / new) if kernel.antialias and len(lengths) else 1.0
    half = math.ceil(kernel.reach * widest)
    starts, lengths = (x.to(device, non_blocking=True).float()[:, None] for x in (starts, lengths))
    place = torch.arange(new, device=device)
    if reverse is not None:
        reverse = reverse.to(device, non_blocking=True)[:, None]
        place = torch.where(reverse, new - 1 - place, place)
    centre = starts + (place + 0.5) * lengths / new
    width = (lengths / new).clamp(min=1)
    if not kernel.antialias:  # OpenCV repeats the border, for Pillow there is nothing beyond
        centre = torch.minimum(torch.maximum(centre, starts + 0.5), starts + lengths - 0.5)
        width = torch.ones_like(width)
    index = centre.floor().long()[..., None] + torch.arange(-half, half + 1, device=device)
    weights = kernel.weights((index + 0.5 - centre[..., None]) / width[..., None])
    inside = (index >= starts[..., None]) & (index < (starts + lengths)[..., None])
    weights = weights * inside
    weights /= weights.sum(-1, keepdim=True)
    # Few of the weights are not zero; those that are written beyond the borders are.
    dense = weights.new_zeros(*centre.shape, old + 2 * half)
    return dense.scatter_(2, index + half, weights)[..., half : half + old]


def _is(transform: dict, kinds: type | tuple[type, ...]) -> bool:
    kind = transform['type']
    kind = TRANSFORMS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, kinds)


_LAW = 'rand_crop_params'


def _check_crop(crop: RandomResizedCrop) -> None:
    name = type(crop).__name__
    if len({inspect.getattr_static(x, _LAW) for x in (type(crop), RandomResizedCrop)}) > 1:
        raise ValueError(
            f'DeviceView: {name} draws its boxes in a way of its own, and cannot run on the '
            "device; use type='RandomResizedCrop'."
        )
    if (crop.backend, crop.interpolation) not in _KERNELS:
        raise ValueError(
            f'DeviceView: {name} with backend={crop.backend!r} and interpolation='
            f"{crop.interpolation!r} cannot run on the device; choose backend='pillow' with "
            "interpolation='bilinear' or 'bicubic'."
        )


def _share_of_flips(flips: Sequence[RandomFlip]) -> float:
    if not flips:
        return 0.0
    flip = flips[0]
    if len(flips) > 1 or flip.direction != 'horizontal' or not isinstance(flip.prob, float):
        raise ValueError(
            f'DeviceView: {len(flips)} RandomFlip of direction={flip.direction!r} and prob='
            f"{flip.prob!r} cannot run on the device; give one of direction='horizontal' and one "
            'prob.'
        )
    return flip.prob
