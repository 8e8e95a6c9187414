"""Weighted k-nearest-neighbour vote on frozen features, of many images or of few."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.device import get_device
from torch import Tensor

from ser_mm.evaluation.metrics import accuracy, mean_interval
from ser_mm.progress import tell_progress


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
        dict[int, Tensor]: For each k the log of the summed votes, shape (M, classes), on the CPU,
        where that of the nearest neighbour counts as 1; -inf for a class without a neighbour.
    """
    device = get_device()
    train, train_labels = F.normalize(train, dim=1).to(device), train_labels.to(device)
    votes = {k: [] for k in dict.fromkeys(ks)}
    for queries in F.normalize(val, dim=1).split(max(1, 2**27 // len(train))):
        similarity = queries.to(device) @ train.T
        similarity, neighbours = similarity.topk(min(max(ks), len(train)), dim=1)
        # Of the nearest one 1: all could be too small for a number.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        for k in votes:
            total = weights.new_zeros(len(queries), int(train_labels.max()) + 1)
            total.scatter_add_(1, train_labels[neighbours[:, :k]], weights[:, :k])
            votes[k].append(total.log().cpu())
    return {k: torch.cat(parts) for k, parts in votes.items()}


def check_shots(labels: Tensor, shots: Sequence[int]) -> None:
    """Check that each class has the images that :func:`few_shot` draws.

    Args:
        labels (Tensor): Of the training images, (N,).
        shots (Sequence[int]): Images of each class.

    Raises:
        ValueError: Naming a class that has fewer.
    """
    counts = torch.bincount(labels)
    if max(shots) > counts.min():
        raise ValueError(
            f'shots={max(shots)}: class {int(counts.argmin())} has {int(counts.min())} training '
            'images; choose as many at most, or take more images.'
        )


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 10,
    ks: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
) -> dict[int, dict[int, dict]]:
    """k-NN with few images of each class: the same vote, of images drawn at random.

    The protocol of DINOv2's evaluation: k is the number of images of each class, or one of ``ks``
    that is smaller. Draws are numbered from 0 and their numbers are their seeds; the images of a
    draw with fewer of each class are among those of the same draw with more.

    Args:
        train (Tensor): Training features, shape (N, C).
        train_labels (Tensor): Shape (N,).
        val (Tensor): Validation features, shape (M, C).
        val_labels (Tensor): Shape (M,).
        shots (Sequence[int]): Images of each class. Defaults to (1, 5, 10).
        draws (int): Times that they are drawn, 2 or more. Defaults to 10.
        ks (Sequence[int]): Numbers of neighbours. Defaults to (10, 20, 100).
        temperature (float): See :func:`knn_votes`. Defaults to 0.07.

    Returns:
        dict[int, dict[int, dict]]: By images of each class and k: ``top1`` of each draw, and
        their ``mean`` with its ``interval``, see
        :func:`~ser_mm.evaluation.metrics.mean_interval`.

    Raises:
        ValueError: If a class has too few images, or there are fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f'draws={draws}: the interval needs two or more.')
    shots = list(dict.fromkeys(shots))  # what is named twice is not drawn more often
    check_shots(train_labels, shots)
    counts = torch.bincount(train_labels)
    starts = counts.cumsum(0) - counts
    used = {n: sorted({n, *(k for k in ks if k < n)}) for n in shots}
    top1: dict[int, dict[int, list[float]]] = {n: {k: [] for k in used[n]} for n in shots}
    for draw in tell_progress(range(draws), draws, 'few-shot k-NN: draw'):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
        order = order[train_labels[order].argsort(stable=True)]
        rank = torch.arange(len(train)) - starts[train_labels[order]]
        for n in shots:
            drawn = order[rank < n]
            votes = knn_votes(train[drawn], train_labels[drawn], val, used[n], temperature)
            for k, scores in votes.items():
                top1[n][k].append(accuracy(scores, val_labels)['top1'])
    return {
        n: {k: dict(top1=values, **mean_interval(values)) for k, values in some.items()}
        for n, some in top1.items()
    }
