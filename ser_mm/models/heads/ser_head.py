from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, get_rank, get_world_size
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.distributed.nn.functional import all_gather as all_gather_with_grad
from torch.utils.checkpoint import checkpoint


@MODELS.register_module()
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

    Raises:
        ValueError: If ``temperature`` or ``block_size`` is not positive.

    Example:
        >>> head = SERHead(temperature=0.5)
        >>> queries = [torch.randn(3, 8, 14, 12), torch.randn(3, 8, 13, 16)]
        >>> keys = [torch.randn_like(q) for q in queries]
        >>> loss = head.loss(queries, keys)
    """

    def __init__(self, temperature: float = 0.5, block_size: int = 1024) -> None:
        super().__init__()
        if temperature <= 0 or block_size <= 0:
            raise ValueError(
                f'SERHead: temperature={temperature} and block_size={block_size} must be positive.'
            )
        self.temperature = temperature
        self.block_size = block_size

    def loss(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """Loss of this rank, averaged over the directions.

        It is scaled such that its mean over ranks, and the mean of its gradients, which is what
        DDP takes, are those of one process holding the images of all ranks. Ranks may hold
        different numbers of images, zero included, on grids of different sizes.

        Args:
            queries (Sequence[Tensor]): Projected token map per direction, (N, C, h_v, w_v).
            keys (Sequence[Tensor]): Key maps on the grids of ``queries``, same shapes. Gradient
                flows to them, across ranks, if they require it.

        Returns:
            Tensor: Scalar; 0, still differentiable, where there is no b2 image.
        """
        with torch.autocast(queries[0].device.type, enabled=False):
            queries = [self._tokens(q) for q in queries]
            keys, images, own = self._gather([self._tokens(k) for k in keys])
            losses = [
                self._sum(q.flatten(0, 1), k, image, first) * get_world_size() / max(len(k), 1)
                for q, k, image, first in zip(queries, keys, images, own, strict=True)
            ]
            return sum(losses) / len(losses)

    @staticmethod
    def _tokens(maps: Tensor) -> Tensor:
        """(N, C, h, w) -> l2-normalized (N, h * w, C), in float32 at least."""
        tokens = maps.flatten(2).transpose(1, 2)
        return F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)

    @staticmethod
    def _gather(keys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Keys of all ranks, by one collective beside that of the sizes.

        Args:
            keys (Sequence[Tensor]): This rank's keys per direction, (N, L_v, C).

        Returns:
            tuple: Per direction, the keys of all ranks (K_v, C), the number of the image that
            each belongs to (K_v,), and where this rank's own begin.
        """
        own = torch.tensor([len(keys[0]), *(k.shape[1] for k in keys)], device=keys[0].device)
        sizes = [row.tolist() for row in all_gather(own)] if get_world_size() > 1 else [own.tolist()]
        packed = torch.cat([k.flatten(0, 1) for k in keys])
        if len(sizes) > 1:
            tokens = [n * sum(lengths) for n, *lengths in sizes]
            padded = F.pad(packed, (0, 0, 0, max(tokens) - len(packed)))
            ranks = [x[:t] for x, t in zip(all_gather_with_grad(padded), tokens, strict=True)]
        else:
            ranks = [packed]
        by_rank = [
            x.split([n * length for length in lengths])
            for x, (n, *lengths) in zip(ranks, sizes, strict=True)
        ]
        total = sum(n for n, *_ in sizes)
        images, first = [], []
        for direction in range(1, len(keys) + 1):
            per_image = torch.tensor([row[direction] for row in sizes for _ in range(row[0])])
            image = torch.arange(total).repeat_interleave(per_image.long())
            images.append(image.to(packed.device, non_blocking=True))
            first.append(sum(row[0] * row[direction] for row in sizes[: get_rank()]))
        return [torch.cat(k) for k in zip(*by_rank, strict=True)], images, first

    def _sum(self, queries: Tensor, keys: Tensor, image: Tensor, first: int) -> Tensor:
        """Sum of the losses of this rank's queries; query m has its positive at ``first + m``."""
        if not len(keys):
            return queries.sum()  # no b2 image on any rank: 0, and a gradient of 0
        positive = torch.arange(first, first + len(queries), device=keys.device)
        # A rank without queries still runs one empty block: the keys that it gathered must take
        # part in its backward pass, where the other ranks wait for it.
        blocks = zip(queries.split(self.block_size), positive.split(self.block_size), strict=True)
        return sum(
            checkpoint(
                self._block, q, p, keys, image, use_reentrant=False, preserve_rng_state=False
            )
            for q, p in blocks
        )

    def _block(self, queries: Tensor, positive: Tensor, keys: Tensor, image: Tensor) -> Tensor:
        logits = queries @ keys.t() / self.temperature
        ignored = image[positive, None] == image
        ignored.scatter_(1, positive[:, None], False)
        return F.cross_entropy(logits.masked_fill(ignored, -torch.inf), positive, reduction='sum')
