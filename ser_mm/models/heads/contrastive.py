"""Contrastive losses of whole embeddings, across ranks."""

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    r"""NT-Xent of pairs (SimCLR, arXiv 2002.05709, equation 1).

    All 2M embeddings of all ranks are rows; the positive of each is its partner, its negatives are
    all other rows, those of its own side included.

    Every rank holds as many pairs. The mean over ranks, and the mean of gradients, which is what
    DDP takes, are then those of one process that holds all.

    Args:
        a (Tensor): Embeddings of one side of this rank's pairs, (M, C).
        b (Tensor): Those of the other side, (M, C).
        temperature (float): Divides the cosines.

    Returns:
        Tensor: Scalar; about :math:`\ln(2M - 1)` for random embeddings.
    """
    with torch.autocast(a.device.type, enabled=False):
        rows = _normalize(torch.cat([a, b]))
        keys = torch.cat(all_gather(rows)) if get_world_size() > 1 else rows
        place = torch.arange(len(rows), device=rows.device)
        first = get_rank() * len(rows)
        own = (first + place)[:, None]
        logits = (rows @ keys.t() / temperature).scatter(1, own, -torch.inf)
        return F.cross_entropy(logits, first + place.roll(len(a)))


def moco_contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    r"""The loss of MoCo v3 (arXiv 2104.02057, Algorithm 1) in both directions, added.

    Each side is contrasted with the other alone, whose gradient is stopped; times
    :math:`2 \tau`. SER's release uses it in place of :func:`nt_xent`.

    Args:
        a (Tensor): Embeddings of one side of this rank's pairs, (M, C).
        b (Tensor): Those of the other side, (M, C).
        temperature (float): :math:`\tau`.
    """
    with torch.autocast(a.device.type, enabled=False):
        sides = [_normalize(x) for x in (a, b)]
        label = get_rank() * len(a) + torch.arange(len(a), device=a.device)
        total = a.new_zeros((), dtype=sides[0].dtype)
        for queries, keys in (sides, sides[::-1]):
            gathered = keys.detach()
            gathered = torch.cat(all_gather(gathered)) if get_world_size() > 1 else gathered
            total = total + F.cross_entropy(queries @ gathered.t() / temperature, label)
        return 2 * temperature * total


LOSSES = dict(nt_xent=nt_xent, moco=moco_contrast)


def gain(target: Tensor, predicted: Tensor, other: Tensor) -> Tensor:
    """How much closer a prediction is to its target than ``other`` is, in cosine, (N, C) each."""
    with torch.no_grad():
        closer = F.cosine_similarity(target, predicted) - F.cosine_similarity(target, other)
        return closer.float().mean()


def _normalize(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
