"""Images under known affine maps: turned by any angle, scaled and shifted."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_mm import geometry

_SLACK = 1e-9  # of places that rounding moves over an edge


class Warp(NamedTuple):
    """A turn about the centre of an image, then a scaling, then a shift.

    Places are (x, y) in pixels from the centre of the image, x to the right and y down.
    """

    angle: float = 0.0
    """Degrees, counter-clockwise as in :mod:`ser_mm.geometry`."""
    scale: float = 1.0
    """Greater than 1 enlarges."""
    shift: tuple[float, float] = (0.0, 0.0)
    """To the right and down, in shares of width and height."""

    @property
    def matrix(self) -> Tensor:
        """Of the turn and the scaling, (2, 2), float64; a quarter turn is exact."""
        turns, rest = divmod(self.angle, 90)
        cos, sin = math.cos(math.radians(rest)), math.sin(math.radians(rest))
        turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
        return self.scale * geometry.D4[int(turns) % 4].double() @ turn

    def move(self, places: Tensor, size: Sequence[int]) -> Tensor:
        """Where places of an image are in the warped one.

        Args:
            places (Tensor): Pixels from the centre, (..., 2), float64.
            size (Sequence[int]): Height and width of the image.

        Returns:
            Tensor: Places, (..., 2).
        """
        return places @ self.matrix.to(places.device).T + self._offset(places, size)

    def move_back(self, places: Tensor, size: Sequence[int]) -> Tensor:
        """Where places of a warped image were; the inverse of :meth:`move`."""
        # The inverse of a matrix s R with a turn R is R^T / s; rows times its transpose.
        inverse = self.matrix.to(places.device) / self.scale**2
        return (places - self._offset(places, size)) @ inverse

    def _offset(self, places: Tensor, size: Sequence[int]) -> Tensor:
        height, width = size
        return places.new_tensor([self.shift[0] * width, self.shift[1] * height])


def rotations(step: float = 15) -> dict[str, list[Warp]]:
    """Turns by 0, step, 2 step, ... degrees, below 360.

    Args:
        step (float): Degrees. Defaults to 15.

    Returns:
        dict[str, list[Warp]]: One by the name of each angle: '0', '15', ...

    Raises:
        ValueError: If ``step`` is not greater than 0.
    """
    if not step > 0:
        raise ValueError(f'step={step}: give the degrees between two angles, greater than 0.')
    angles = [i * step for i in range(math.ceil(360 / step - _SLACK))]
    return {f'{angle:g}': [Warp(angle)] for angle in angles}


def draw_warps(
    count: int,
    scale: Sequence[float] = (3 / 4, 4 / 3),
    shift: float = 1 / 8,
    seed: int = 0,
) -> list[Warp]:
    """Draw affine warps: any angle, log-uniform scales, uniform shifts.

    Args:
        count (int): How many.
        scale (Sequence[float]): Range of scales. Defaults to (3 / 4, 4 / 3).
        shift (float): Largest shift in each direction, as a share of the side. Defaults to 1 / 8.
        seed (int): Defaults to 0.
    """
    rng = torch.Generator().manual_seed(seed)
    low, high = map(math.log, scale)
    drawn = torch.rand(count, 4, generator=rng, dtype=torch.float64).tolist()
    return [
        Warp(360 * a, math.exp(low + (high - low) * s), (shift * (2 * x - 1), shift * (2 * y - 1)))
        for a, s, x, y in drawn
    ]


def cell_centres(grid: Sequence[int], size: Sequence[int]) -> Tensor:
    """Centres of the cells of a grid that covers an image.

    Args:
        grid (Sequence[int]): Rows and columns of cells: tokens, or pixels.
        size (Sequence[int]): Height and width of the image.

    Returns:
        Tensor: Pixels from the centre of the image, row by row, (rows * columns, 2), float64.
    """
    y, x = (
        torch.arange(1 - n, n, 2, dtype=torch.float64) * (side / (2 * n))
        for n, side in zip(grid, size, strict=True)
    )
    return torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1).flatten(0, 1)


def warp_images(images: Tensor, warp: Warp) -> Tensor:
    """Warp images in their frame.

    Sampled bicubically in float64, so that a quarter turn of a square comes back exact, and
    reflected at the border. Against aliasing, an image that shrinks is sampled in
    ceil(1 / scale) places along each side of a pixel, which are averaged.

    Args:
        images (Tensor): Shape (N, C, H, W).
        warp (Warp): The same for all.

    Returns:
        Tensor: Warped images, (N, C, H, W), of the dtype of ``images``.
    """
    size = images.shape[-2:]
    finer = max(1, math.ceil(1 / warp.scale - _SLACK))
    grid = [n * finer for n in size]
    half = torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64)
    source = (warp.move_back(cell_centres(grid, size), size) / half).view(1, *grid, 2)
    moved = F.grid_sample(
        images.double(),
        source.to(images.device).expand(len(images), -1, -1, -1),
        mode='bicubic',
        padding_mode='reflection',
        align_corners=False,
    )
    return F.avg_pool2d(moved, finer).to(images.dtype)


def visible_cells(grid: Sequence[int], size: Sequence[int], warp: Warp) -> Tensor:
    """Which cells of a warped image show nothing but the image, and no reflection of it.

    Args:
        grid (Sequence[int]): Rows and columns of cells.
        size (Sequence[int]): Height and width of the image.
        warp (Warp): The warp.

    Returns:
        Tensor: Booleans, row by row, (rows * columns,).
    """
    (rows, columns), (height, width) = grid, size
    corner = torch.tensor([width / columns, height / rows], dtype=torch.float64) / 2
    signs = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    corners = cell_centres(grid, size)[:, None] + signs * corner
    border = torch.tensor([width / 2, height / 2], dtype=torch.float64) * (1 + _SLACK)
    return (warp.move_back(corners, size).abs() <= border).flatten(1).all(dim=1)


def disc(size: Sequence[int], margin: float = 2) -> Tensor:
    """The disc inside an image that every turn maps onto itself.

    Args:
        size (Sequence[int]): Height and width of the image.
        margin (float): Pixels between the disc and the nearest border: as far as bicubic sampling
            reaches, so that no image that is turned once shows a reflection in it. Defaults to 2.

    Returns:
        Tensor: 1 inside and 0 outside, (H, W).

    Raises:
        ValueError: If nothing is inside.
    """
    radius = min(size) / 2 - margin
    inside = (cell_centres(size, size).norm(dim=1) <= radius).float().view(*size)
    if not inside.any():
        raise ValueError(
            f'images of {size[0]} x {size[1]} pixels hold no disc {margin:g} pixels from their '
            'border; take larger images.'
        )
    return inside
