from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, get_rank, get_world_size
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_grad
from torch.utils.checkpoint import checkpoint

from ser_mm.arguments import Positive, PositiveFloat, checked
from ser_mm.views import pack_maps


@MODELS.register_module()
@checked
class SERHead(BaseModule):
    r"""Dense InfoNCE over tokens, the equivariance loss of SER (paper, Section 3).

    For the tokens :math:`q_m` of a view and the keys :math:`k_n` of all ranks on the same grid,

    .. math::
        L = -\frac{1}{M} \sum_m \log \frac{e^{q_m \cdot k_m / \tau}}
            {e^{q_m \cdot k_m / \tau} + \sum_{n: img(n) \neq img(m)} e^{q_m \cdot k_n / \tau}}

    The positive is the key at the same place of the same image, the negatives are the keys of all
    other images; the other tokens of the same image are neither.

    Each rank holds its own queries against the gathered keys, in blocks whose logits are computed
    again in the backward pass, so memory grows linearly with the number of tokens.

    Args:
        temperature (float): :math:`\tau`. Defaults to 0.5.
        block_size (int): Queries whose logits exist at one time. Defaults to 1024.
        negatives (str): Views whose tokens of other images are negatives: 'other', that of the
            keys, as in the authors' release; or 'both', as a summary of the paper has the formula.
            Defaults to 'other'.

    Raises:
        ValueError: If ``temperature`` or ``block_size`` is not a positive number, or ``negatives``
            is unknown.

    Example:
        >>> head = SERHead(temperature=0.5)
        >>> queries = [torch.randn(3, 8, 14, 12), torch.randn(3, 8, 13, 16)]
        >>> keys = [torch.randn_like(q) for q in queries]
        >>> loss = head.loss(queries, keys)
    """

    def __init__(
        self,
        temperature: PositiveFloat = 0.5,
        block_size: Positive = 1024,
        negatives: Literal['other', 'both'] = 'other',
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.block_size = block_size
        self.negatives = negatives

    def loss(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        same_view: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Loss of this rank, averaged over the directions.

        It is scaled such that its mean over ranks, and the mean of its gradients, which is what
        DDP takes, are those of one process holding the images of all ranks. Ranks may hold
        different numbers of images, zero included, on grids of different sizes.

        Args:
            queries (Sequence[Tensor]): Projected token map per direction, (N, C, h_v, w_v).
            keys (Sequence[Tensor]): Key maps on the grids of ``queries``, same shapes. Gradient
                flows to them, across ranks, if they require it.
            same_view (Sequence[Tensor], optional): Key maps of the view of ``queries``, same
                shapes, that give further negatives. Needed with ``negatives='both'``, and unused
                without. Defaults to None.

        Returns:
            Tensor: Scalar; 0, still differentiable, where there is no b2 image.

        Raises:
            ValueError: If ``same_view`` is needed and missing.
        """
        sides = [keys]
        if self.negatives == 'both':
            if same_view is None:
                raise ValueError(
                    "SERHead: negatives='both' needs the keys of both views; give same_view, or "
                    "set negatives='other'."
                )
            sides.append(same_view)
        with torch.autocast(queries[0].device.type, enabled=False):
            sizes = _gather_sizes(queries)
            tokens = [[n * length for length in lengths] for n, *lengths in sizes]
            packed_queries = _normalize(queries) / self.temperature
            by_side = []
            for side in sides:
                gathered = _gather(_normalize(side), [sum(rank) for rank in tokens])
                by_side.append([k.split(rank) for k, rank in zip(gathered, tokens, strict=True)])
            losses = []
            for v, q in enumerate(packed_queries.split(tokens[get_rank()])):
                k = torch.cat([rank[v] for side in by_side for rank in side])
                image = _number_images([(row[0], row[1 + v]) for row in sizes])
                # DDP takes the mean over ranks, and this is one over directions.
                total = len(image) * len(queries) / get_world_size()
                image = image.repeat(2) if len(sides) == 2 else image
                first = sum(rank[v] for rank in tokens[: get_rank()])
                image = image.to(k.device, non_blocking=True)
                losses.append(self._direction(q, k, image, first, total))
            return sum(losses[1:], losses[0])

    def _direction(
        self, queries: Tensor, keys: Tensor, image: Tensor, first: int, total: float
    ) -> Tensor:
        """This rank's part of the mean over all queries of one direction.

        Args:
            queries (Tensor): This rank's, divided by the temperature, (M, C).
            keys (Tensor): Those of all ranks, (K, C), the positives first.
            image (Tensor): Number of the image that each key belongs to, (K,).
            first (int): Query m has its positive at ``first + m``.
            total (float): What to divide by: queries of all ranks, by directions over ranks.
        """
        if not len(keys):
            return queries.sum()  # no b2 image on any rank: 0, and a gradient of 0
        positive = torch.arange(first, first + len(queries), device=keys.device)
        own = image[first : first + len(queries)]
        if len(queries) <= self.block_size:
            # Also for no query at all: the keys that this rank gathered must take part in its
            # backward pass, where the other ranks wait for it.
            return _block_loss(queries, positive, own, keys, image) / total
        blocks = zip(*(x.split(self.block_size) for x in (queries, positive, own)), strict=True)
        return (
            sum(
                checkpoint(_block_loss, *block, keys, image, use_reentrant=False)
                for block in blocks
            )
            / total
        )


def _normalize(maps: Sequence[Tensor]) -> Tensor:
    """Packed tokens of maps, l2-normalized, in float32 at least: (T, C)."""
    tokens = pack_maps(maps)
    return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=1)


def _block_loss(
    queries: Tensor, positive: Tensor, own: Tensor, keys: Tensor, image: Tensor
) -> Tensor:
    """Sum of the losses of a block of queries that belong to the images ``own``."""
    ignored = own[:, None] == image
    ignored.scatter_(1, positive[:, None], False)
    logits = (queries @ keys.t()).masked_fill(ignored, -torch.inf)
    return F.cross_entropy(logits, positive, reduction='sum')


def _number_images(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Number of the image that each token is of; per rank, its images and their tokens."""
    numbers, first = [], 0
    for n, length in sizes:
        numbers.append(torch.arange(first * length, (first + n) * length) // max(length, 1))
        first += n
    return numbers[0] if len(numbers) == 1 else torch.cat(numbers)


def _gather_sizes(maps: Sequence[Tensor]) -> list[list[int]]:
    """Number of images, then of tokens per image in each direction, of each rank.

    Each rank counts its images and draws its grids for itself, and the host has to know those of
    all, so with several ranks it waits for the device here; with one it never does.
    """
    own = [len(maps[0]), *(x.shape[-2] * x.shape[-1] for x in maps)]
    if get_world_size() == 1:
        return [own]
    return torch.stack(all_gather(torch.tensor(own, device=maps[0].device))).tolist()


def _gather(tokens: Tensor, lengths: list[int]) -> list[Tensor]:
    """Tokens (T, C) of each rank, ``lengths`` of them; gradient flows back to their rank."""
    if len(lengths) == 1:
        return [tokens]
    padded = F.pad(tokens, (0, 0, 0, max(lengths) - len(tokens)))
    return [x[:n] for x, n in zip(all_gather_with_grad(padded), lengths, strict=True)]
