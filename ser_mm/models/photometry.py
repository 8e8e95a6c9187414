"""Photometric transforms of MMPretrain's pipelines, on batches and on their device."""

from collections.abc import Callable, Sequence

import torch
from mmcv.transforms import BaseTransform, RandomApply, RandomGrayscale
from mmpretrain.datasets.transforms import ColorJitter, GaussianBlur, Solarize
from mmpretrain.registry import TRANSFORMS
from torch import Tensor

_GRAY = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601


class Photometry:
    """A photometric policy, written as for MMPretrain's pipelines, for batches on any device.

    Each image gets draws of its own, from the same distributions; only the order of the four steps
    of ``ColorJitter`` is drawn once for a batch. Random numbers come from torch's generator of the
    host, so that the seed of a run fixes them and no operation waits for the device. Values are not
    rounded to whole grey levels in between, as they are on uint8 images.

    Args:
        transforms (Sequence[dict]): Configs of ``ColorJitter``, ``RandomGrayscale``,
            ``GaussianBlur``, ``Solarize``, or ``RandomApply`` around such.

    Raises:
        ValueError: If a transform is not one of these.

    Example:
        >>> photometry = Photometry([dict(type='Solarize', thr=128, prob=0.2)])
        >>> images = photometry(255 * torch.rand(8, 3, 32, 32))
    """

    def __init__(self, transforms: Sequence[dict]) -> None:
        self.transforms = [TRANSFORMS.build(transform) for transform in transforms]
        for transform in self.transforms:
            _check(transform)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Change images.

        Args:
            images (Tensor): RGB in [0, 255], float, (N, 3, H, W).

        Returns:
            Tensor: Likewise, a new tensor unless no image was changed.
        """
        # In half precision, 255 grey levels could not be told apart.
        with torch.autocast(images.device.type, enabled=False):
            for transform in self.transforms:
                images = _apply(transform, images)
        return images

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.transforms})'


def _check(transform: BaseTransform) -> None:
    if not isinstance(transform, tuple(_OPERATIONS)):
        raise ValueError(
            f'Photometry: {type(transform).__name__} cannot run on the device, only '
            f'{", ".join(kind.__name__ for kind in _OPERATIONS)} can; leave it in the pipeline.'
        )
    fixed = {GaussianBlur: 'radius', Solarize: 'thr'}
    name = next((name for kind, name in fixed.items() if isinstance(transform, kind)), None)
    if isinstance(transform, (GaussianBlur, Solarize)) and getattr(transform, str(name)) is None:
        level, std = transform.magnitude_level, transform.magnitude_std
        if std != 'inf' or level != transform.total_level:
            raise ValueError(
                f'Photometry: {type(transform).__name__} draws with magnitude_std={std!r} and '
                f'magnitude_level={level}; on the device it is uniform in magnitude_range: set '
                "magnitude_std='inf' and leave out the levels."
            )
    for inner in transform if isinstance(transform, RandomApply) else ():
        _check(inner)


def _apply(transform: BaseTransform, images: Tensor) -> Tensor:
    """A transform of the images that it chooses; the others stay as they are."""
    operation = next(x for kind, x in _OPERATIONS.items() if isinstance(transform, kind))
    chosen = torch.rand(len(images)) < getattr(transform, 'prob', 1)
    if chosen.all():
        return operation(transform, images)
    if not chosen.any():
        return images
    index = chosen.nonzero().flatten().to(images.device, non_blocking=True)
    return images.index_copy(0, index, operation(transform, images[index]))


def _random_apply(transform: RandomApply, images: Tensor) -> Tensor:
    for inner in transform:
        images = _apply(inner, images)
    return images


def _color_jitter(transform: ColorJitter, images: Tensor) -> Tensor:
    steps = [
        (torch.mul, transform.brightness),
        (_change_contrast, transform.contrast),
        (_change_saturation, transform.saturation),
        (_turn_hue, transform.hue),
    ]
    for step in torch.randperm(len(steps)).tolist():
        function, bounds = steps[step]
        if bounds is not None:
            images = function(images, _uniform(bounds, images)).clamp_(0, 255)
    return images


def _change_contrast(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(images).mean((2, 3), keepdim=True), images, factor)


def _change_saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_gray(images), images, factor)


def _gray(images: Tensor, weights: Sequence[float] = _GRAY) -> Tensor:
    """Grey values, (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2])


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    # HSV's hue, in sixths of a turn, from the smallest value and the range of each pixel. It works
    # plane by plane, as reductions over three channels take several times as long.
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    hue = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(value == red, green - blue, hue).div_(chroma.clamp(min=1e-6))
    hue = hue.div_(6).add_(turns.squeeze(1))
    hue = (hue - hue.floor()).mul_(6)
    planes = ((hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_())
    return torch.stack(
        [torch.addcmul(least, chroma, plane.clamp_(0, 1)) for plane in planes], dim=1
    )


def _grayscale(transform: RandomGrayscale, images: Tensor) -> Tensor:
    total = sum(transform.channel_weights)
    weights = [weight / total for weight in transform.channel_weights]
    if transform.color_format == 'bgr':
        weights.reverse()
    return _gray(images, weights).expand_as(images)


def _gaussian_blur(transform: GaussianBlur, images: Tensor) -> Tensor:
    if transform.radius is not None:
        sigma = torch.full((len(images), 1), float(transform.radius))
    else:
        low, high = transform.magnitude_range
        sigma = low + (high - low) * torch.rand(len(images), 1)
    kernel = _pillow_kernel(sigma.double()).to(images, non_blocking=True)
    n, channels, height, width = images.shape
    # As products with matrices, faster than convolutions with a kernel for each image.
    across = _band(kernel, width).transpose(1, 2)
    images = torch.bmm(images.reshape(n, channels * height, width), across)
    images = images.view(n, channels, height, width).transpose(1, 2)
    images = torch.bmm(_band(kernel, height), images.reshape(n, height, channels * width))
    return images.view(n, height, channels, width).transpose(1, 2).contiguous()


def _band(kernel: Tensor, size: int) -> Tensor:
    """Matrices (N, size, size) that convolve a line, whose ends are repeated, with (N, taps)."""
    n, taps = kernel.shape
    place = torch.arange(size, device=kernel.device)[:, None]
    index = (place + torch.arange(taps, device=kernel.device)).expand(n, size, taps)
    band = kernel.new_zeros(n, size, size + taps - 1)
    band.scatter_(2, index, kernel[:, None].expand(n, size, taps))
    before, band, after = band.split([taps // 2, size, taps // 2], dim=2)
    band[..., 0] += before.sum(2)
    band[..., -1] += after.sum(2)
    return band


def _pillow_kernel(sigma: Tensor) -> Tensor:
    """Pillow's approximation of a Gaussian, three boxes one after the other, (N, taps).

    A box reaches ``r`` pixels to each side, and covers the last one in part, such that the three
    have the variance of the Gaussian; a Gaussian sampled at whole pixels has less for small sigma.
    """
    variance = sigma**2 / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    r = whole + part / (6 * (variance - (whole + 1) ** 2))
    reach = int(r.max().ceil())
    boxes = (r + 1 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1) / (2 * r + 1)
    taps = 6 * reach + 1
    return torch.fft.irfft(torch.fft.rfft(boxes, taps) ** 3, taps)


def _solarize(transform: Solarize, images: Tensor) -> Tensor:
    threshold = transform.thr
    if threshold is None:
        threshold = _uniform(transform.magnitude_range, images)
    return torch.where(images < threshold, images, 255 - images)


def _uniform(bounds: tuple[float, float], images: Tensor) -> Tensor:
    """A number for each image, on its device, (N, 1, 1, 1)."""
    low, high = bounds
    drawn = low + (high - low) * torch.rand(len(images), 1, 1, 1)
    return drawn.to(images.device, non_blocking=True)


_OPERATIONS: dict[type[BaseTransform], Callable[[BaseTransform, Tensor], Tensor]] = {
    ColorJitter: _color_jitter,
    RandomGrayscale: _grayscale,
    GaussianBlur: _gaussian_blur,
    Solarize: _solarize,
    RandomApply: _random_apply,
}
