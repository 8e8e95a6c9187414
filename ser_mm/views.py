"""The batch container that carries b1 and b2 through a base algorithm."""

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
