"""Weighted k-nearest-neighbour vote on frozen features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.device import get_device
from torch import Tensor

from ser_mm.evaluation.metrics import accuracy


def knn_probe(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the weighted k-nearest-neighbour vote on frozen features.

    A neighbour votes with weight ``exp(cosine similarity / temperature)``, as in instance
    discrimination (Wu et al., arXiv 1805.01978) and DINO.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        val_labels (Tensor): Shape (M,).
        k (int): Neighbours, at most N of them. Defaults to 20.
        temperature (float): Defaults to 0.07.

    Returns:
        float: Share of the validation features classified rightly, in [0, 1].
    """
    votes = knn_votes(train, train_labels, val, [k], temperature)[k]
    return accuracy(votes, val_labels)['top1']


def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    ks: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """Votes of the nearest neighbours, as in :func:`knn_probe`, for several k at once.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        ks (Sequence[int]): Numbers of neighbours. Defaults to (10, 20, 100).
        temperature (float): Defaults to 0.07.

    Returns:
        dict[int, Tensor]: For each k the log of the summed votes, shape (M, classes), on the CPU;
        -inf for a class without a neighbour.
    """
    device = get_device()
    train, train_labels = F.normalize(train, dim=1).to(device), train_labels.to(device)
    votes = {k: [] for k in ks}
    for queries in F.normalize(val, dim=1).split(max(1, 2**27 // len(train))):
        similarity = queries.to(device) @ train.T
        similarity, neighbours = similarity.topk(min(max(ks), len(train)), dim=1)
        weights = ((similarity - 1) / temperature).double().exp()
        for k in ks:
            total = weights.new_zeros(len(queries), int(train_labels.max()) + 1)
            total.scatter_add_(1, train_labels[neighbours[:, :k]], weights[:, :k])
            votes[k].append(total.log().cpu())
    return {k: torch.cat(parts) for k, parts in votes.items()}
