"""The group that SER is equivariant to: D4 and resizing, as matrices acting on maps.

A geometric element is ``g = S o D`` (paper, Section 3): ``D`` one of the eight symmetries of the
square, then ``S`` a resize to another grid. In coordinates normalized to [-1, 1] (x to the right,
y down, pixel centres at half steps) the resize is the identity, so an element is its 2x2 matrix
``D`` together with the size of the grid it maps onto, and composing elements is multiplying
matrices. The elements of D4 are numbered ``d = 4 * flip + quarter_turns``: flip left-right first,
then turn counter-clockwise, as :func:`numpy.rot90` does.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_ELEMENTS = 8
ELEMENT_NAMES = tuple(
    f'{"flip + " if flip else ""}rot{90 * turns}' for flip in (False, True) for turns in range(4)
)


def _d4() -> Tensor:
    flip = torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    return torch.stack(
        [
            torch.linalg.matrix_power(turn, turns) @ torch.linalg.matrix_power(flip, flips)
            for flips in range(2)
            for turns in range(4)
        ]
    )


D4 = _d4()
"""Tensor: the eight elements of D4 as matrices, shape (8, 2, 2)."""


def matrices(elements: Tensor) -> Tensor:
    """Matrices of D4 elements given by number.

    Args:
        elements (Tensor): Integers in [0, 8), shape (N,).

    Returns:
        Tensor: Float matrices on the device of ``elements``, shape (N, 2, 2).
    """
    return D4.to(elements.device, non_blocking=True)[elements]


def draw_grid(
    base: Sequence[float],
    scale: Sequence[float] = (0.7, 1.3),
    aspect_ratio: Sequence[float] = (3 / 4, 4 / 3),
    generator: torch.Generator | None = None,
) -> tuple[int, int]:
    """Draw the resize S of a group element: the grid of tokens to map onto (paper, Section 3).

    The area is a factor times that of the base grid, the factor uniform in ``scale``; width over
    height is log-uniform in ``aspect_ratio``; both sides are rounded to whole tokens.

    Args:
        base (Sequence[float]): Height and width of the base grid, in tokens.
        scale (Sequence[float]): Range of the area factor. Defaults to (0.7, 1.3).
        aspect_ratio (Sequence[float]): Range of width / height. Defaults to (3 / 4, 4 / 3).
        generator (torch.Generator, optional): On the CPU. Defaults to None: torch's own.

    Returns:
        tuple[int, int]: Height and width in tokens, at least 1 each.
    """
    u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    log_low, log_high = map(math.log, aspect_ratio)
    area = math.prod(base) * (scale[0] + (scale[1] - scale[0]) * u)
    aspect = math.exp(log_low + (log_high - log_low) * v)
    height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    return max(height, 1), max(width, 1)


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """``outer o inner``: the element that acts as ``inner`` first, then as ``outer``.

    Args:
        outer (Tensor): Matrices, shape (N, 2, 2).
        inner (Tensor): Matrices, shape (N, 2, 2).

    Returns:
        Tensor: Matrices, shape (N, 2, 2).
    """
    return outer @ inner


def invert(element: Tensor) -> Tensor:
    """Inverse of D4 elements: their transpose, exactly.

    Args:
        element (Tensor): Orthogonal matrices, shape (N, 2, 2).

    Returns:
        Tensor: Matrices, shape (N, 2, 2).
    """
    return element.transpose(-1, -2)


def act(maps: Tensor, element: Tensor, size: Sequence[int]) -> Tensor:
    """rho_g: move maps by a group element each, onto a grid of another size (paper, Section 3).

    ``act(x, g, size)[p] = x[g^-1 p]``, interpolated bicubically with replicated borders, which is
    what :func:`torch.rot90`, :func:`torch.flip` and ``F.interpolate(mode='bicubic')`` do for the
    elements that they cover. Images are maps with three channels.

    Args:
        maps (Tensor): Shape (N, C, H, W); N may be 0.
        element (Tensor): One matrix per map, shape (N, 2, 2).
        size (tuple[int, int]): Height and width of the grid to map onto.

    Returns:
        Tensor: Shape (N, C, h, w) with (h, w) = ``size``, of the dtype of ``maps``.
    """
    # In float32 the rounding of the sampling positions alone moves values by 4e-6; in float64 a
    # turn or a flip comes back exact after rounding to the dtype of the maps.
    y, x = (torch.arange(1 - n, n, 2, dtype=torch.float64, device=maps.device) / n for n in size)
    target = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=-1)
    source = target @ element.double()[:, None]  # g^-1 p for each place p: rows times (g^-1)^T = g
    moved = F.grid_sample(
        maps.double(), source, mode='bicubic', padding_mode='border', align_corners=False
    )
    return moved.to(maps.dtype)


def act_on_array(image: np.ndarray, element: int) -> np.ndarray:
    """Apply one D4 element to an image array without loss.

    Args:
        image (np.ndarray): Shape (H, W, C) or (H, W), any dtype.
        element (int): Number of the element, in [0, 8).

    Returns:
        np.ndarray: The moved image, contiguous; (W, H, C) for odd quarter turns.
    """
    flips, turns = divmod(int(element), 4)
    if flips:
        image = image[:, ::-1]
    return np.ascontiguousarray(np.rot90(image, turns))


def act_on_images(images: Tensor, elements: Tensor) -> Tensor:
    """Apply a D4 element to each image of a batch without loss, as :func:`act_on_array` does.

    Args:
        images (Tensor): Square, (N, C, H, H), on any device; N may be 0.
        elements (Tensor): Number of the element of each, (N,), on the host.

    Returns:
        Tensor: The moved images, (N, C, H, H).
    """
    moved = images.clone()
    for element in elements.unique().tolist():
        flips, turns = divmod(element, 4)
        rows = (elements == element).nonzero().flatten().to(images.device, non_blocking=True)
        some = images[rows]
        some = torch.rot90(some.flip(3) if flips else some, turns, (2, 3))
        moved.index_copy_(0, rows, some)
    return moved
