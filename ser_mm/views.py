"""The batch container that carries b1 and b2 through a base algorithm, and how many are in b2."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn

_NO_TENSOR = (
    'it holds b1 and b2, which differ in size, and only a backbone that supports SER takes it'
)


@dataclass(eq=False)
class ViewBatch:
    """One view of a mini-batch: b1 at the base size, b2 at another size.

    The base algorithm takes it for a batch of images and hands it to its backbones. A backbone
    that supports SER returns embeddings of all N1 + N2 images, b1 first, and leaves the token map
    of b2 in ``token_maps``, with itself as the key. To use it as a tensor in any other way, such
    as to stack two of them, is an error that says why.

    Attributes:
        base (Tensor): Images of b1, shape (N1, 3, H, W).
        equi (Tensor): Images of b2, shape (N2, 3, h, w); N2 may be 0.
        elements (Tensor): Number of the D4 element that each image of b2 was moved by in this
            view (see :mod:`ser_mm.geometry`), shape (N2,).
        token_maps (dict[nn.Module, Tensor]): Token map of b2 that each backbone saw, shape
            (N2, C, h / stride, w / stride).
        draws (Tensor, optional): What was drawn for the view, (N1 + N2, 18), see
            :mod:`ser_mm.draws`.
        wants_features (bool): Whether backbones are to leave ``features``.
        features (dict[nn.Module, Tensor]): What each backbone gives to an equivariance objective of
            all images, (N1 + N2, C).
    """

    base: Tensor
    equi: Tensor
    elements: Tensor
    token_maps: dict[nn.Module, Tensor] = field(default_factory=dict)
    draws: Tensor | None = None
    wants_features: bool = False
    features: dict[nn.Module, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.base) + len(self.equi)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f'a view has no `{name}`, for {_NO_TENSOR}')

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args=(), kwargs=None) -> NoReturn:
        raise TypeError(f'`{function.__name__}` cannot take a view, for {_NO_TENSOR}')


def count_b2(equi_ratio: float, images: int) -> int:
    """Images of a global batch that are in b2 (paper, Section 3).

    Args:
        equi_ratio (float): Share of b2, 0 to 1.
        images (int): Images of the batch, on all ranks.

    Returns:
        int: ``round(equi_ratio * images)``; but at least two, as one image has no negatives, unless
        ``equi_ratio`` is 0.
    """
    return max(round(equi_ratio * images), min(2, images)) if equi_ratio > 0 else 0


def count_b2_of_rank(equi_ratio: float, images: int, rank: int, world_size: int) -> int:
    """Images of b2 that a rank has, where all have as many images and b2 to within one.

    Args:
        equi_ratio (float): Share of b2, 0 to 1.
        images (int): Images of the batch on this rank.
        rank (int): This rank.
        world_size (int): Number of ranks.

    Returns:
        int: :func:`count_b2`, dealt over the ranks.
    """
    whole, rest = divmod(count_b2(equi_ratio, images * world_size), world_size)
    return min(whole + (rank < rest), images)


def check_b2(owner: str, equi_ratio: float, images: int) -> None:
    """Refuse full batches of which less than two images are in b2.

    Args:
        owner (str): Whose argument ``equi_ratio`` is.
        equi_ratio (float): Share of b2, 0 to 1.
        images (int): Images of a global batch; 0 if that is not known.

    Raises:
        ValueError: With what to raise.
    """
    wanted = round(equi_ratio * images)
    if not images or equi_ratio == 0 or wanted >= 2:
        return
    more = f'the batch to {math.ceil(1.5 / equi_ratio) + 1} images'
    if images > 1:
        more = f'equi_ratio to {2 / images:.2g} or more, or {more}'
    raise ValueError(
        f'{owner}: equi_ratio={equi_ratio:g} of a global batch of {images} images is {wanted} in '
        f'b2, and the SER loss contrasts at least two; raise {more}.'
    )


def pack_maps(maps: Sequence[Tensor]) -> Tensor:
    """The tokens of maps of any sizes, row by row and one map after the other.

    Args:
        maps (Sequence[Tensor]): Shape (N_i, C, h_i, w_i) each.

    Returns:
        Tensor: Shape (T, C), T the sum of N_i * h_i * w_i.
    """
    return torch.cat([x.flatten(2).transpose(1, 2).flatten(0, 1) for x in maps])


def unpack_maps(tokens: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of :func:`pack_maps`, with any number of channels.

    Args:
        tokens (Tensor): Shape (T, C').
        like (Sequence[Tensor]): Maps whose sizes to restore.

    Returns:
        list[Tensor]: Shape (N_i, C', h_i, w_i) each.
    """
    sizes = [(len(x), *x.shape[-2:]) for x in like]
    parts = tokens.split([n * h * w for n, h, w in sizes])
    return [x.unflatten(0, size).permute(0, 3, 1, 2) for x, size in zip(parts, sizes, strict=True)]
