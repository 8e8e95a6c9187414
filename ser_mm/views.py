"""The batch container that carries b1 and b2 through a base algorithm."""

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(eq=False)
class ViewBatch:
    """One view of a mini-batch: b1 at the base size, b2 at a size of its own.

    The base algorithm takes it for a batch of images and hands it to its backbones. A backbone
    that supports SER returns embeddings of all N1 + N2 images, b1 first, and leaves the token map
    of b2 under its own name in :attr:`token_maps`.

    Attributes:
        base (Tensor): Images of b1, shape (N1, 3, H, W).
        equi (Tensor): Images of b2, shape (N2, 3, h, w); N2 may be 0.
        elements (Tensor): Number of the D4 element that each image of b2 was moved by in this
            view (see :mod:`ser_mm.geometry`), shape (N2,).
        token_maps (dict[nn.Module, Tensor]): Token map of b2 that each backbone saw, shape
            (N2, C, h / stride, w / stride).
    """

    base: Tensor
    equi: Tensor
    elements: Tensor
    token_maps: dict[nn.Module, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.base) + len(self.equi)
