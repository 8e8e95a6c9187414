"""Accuracies, means and differences with confidence intervals, and the rank of features."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def accuracy(scores: Tensor, labels: Tensor, confidence: float = 0.95) -> dict:
    """Top-1 and top-5 accuracy with Wilson's confidence intervals.

    Args:
        scores (Tensor): Shape (N, K), larger for likelier classes. A class whose score is not
            finite does not count as an answer.
        labels (Tensor): Shape (N,).
        confidence (float): Of the intervals. Defaults to 0.95.

    Returns:
        dict: ``top1`` and ``top5`` as shares in [0, 1], their intervals ``top1_ci`` and
        ``top5_ci``, and ``images``, N.
    """
    from scipy.stats import binomtest

    top, classes = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (classes == labels.to(scores.device)[:, None]) & top.isfinite()
    result: dict[str, Any] = dict(images=len(labels))
    for k in (1, 5):
        count = int(hits[:, :k].any(dim=1).sum())
        interval = binomtest(count, len(labels)).proportion_ci(confidence, method='wilson')
        result |= {f'top{k}': count / len(labels), f'top{k}_ci': [interval.low, interval.high]}
    return result


def tell_unseen(train: Tensor, labels: Tensor) -> list[str]:
    """A sentence on validation images of classes that no training image has.

    Args:
        train (Tensor): Labels of the training images, (N,).
        labels (Tensor): Those of the validation images, (M,).

    Returns:
        list[str]: One sentence, or none where there are no such images.
    """
    unseen = labels[~torch.isin(labels, train)]
    if not len(unseen):
        return []
    return [
        f'{len(unseen)} of {len(labels)} validation images are of {len(unseen.unique())} classes '
        f'without a training image, class {int(unseen[0])} say, and are counted as wrong: the '
        f'top-1 accuracy cannot be above {1 - len(unseen) / len(labels):.4f}.'
    ]


def check_finite(outputs: Sequence[Tensor]) -> None:
    """Check what a network gives, before figures are made of it.

    Args:
        outputs (Sequence[Tensor]): Features or maps, of any shapes.

    Raises:
        ValueError: If there is an infinite number, or NaN.
    """
    if not all(x.isfinite().all() for x in outputs):
        raise ValueError(
            'the network gives numbers that are not finite; the training of this checkpoint has '
            'diverged, so take an earlier one.'
        )


def rank_me(features: Tensor) -> float:
    """Effective rank of features, RankMe (Garrido et al., ICML 2023, equations 1 and 2).

    The exponential of the entropy of their singular values, which are not centred.

    Args:
        features (Tensor): Shape (N, C).

    Returns:
        float: From 1, all on a line through 0, to min(N, C).
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean of a sample with Student's interval.

    Args:
        values (Sequence[float]): Two or more.
        confidence (float): Of the interval. Defaults to 0.95.

    Returns:
        dict: ``mean`` and its ``interval``.

    Raises:
        ValueError: If there are fewer than two values.
    """
    from scipy.stats import t

    if len(values) < 2:
        raise ValueError('mean_interval: one value has no deviation; give two or more.')
    mean = statistics.mean(values)
    error = statistics.stdev(values) / len(values) ** 0.5
    reach = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return dict(mean=mean, interval=[mean - reach, mean + reach])


def paired_difference(
    one: Sequence[float], other: Sequence[float], confidence: float = 0.95
) -> dict[str, Any]:
    """Mean difference of paired values, with Student's interval and test.

    Args:
        one (Sequence[float]): Two or more values.
        other (Sequence[float]): As many, in the same order.
        confidence (float): Of the interval. Defaults to 0.95.

    Returns:
        dict: ``mean`` of one - other, its ``interval``, ``p`` of the two-sided test that it is
        0, and how many differences are ``positive``. Interval and p are nan where the differences
        are equal up to rounding, as those of rounded figures may be: the test would be certain.

    Raises:
        ValueError: If there are fewer than two pairs, or not as many of each.
    """
    from scipy.stats import ttest_rel

    if len(one) < 2:
        raise ValueError('paired_difference: one pair has no deviation; give two or more.')
    differences = [x - y for x, y in zip(one, other, strict=True)]
    rounding = 1e-9 * max(map(abs, [*one, *other]))
    interval, p = [math.nan, math.nan], math.nan
    if max(differences) - min(differences) > rounding:
        test = ttest_rel(one, other)
        interval = [float(x) for x in test.confidence_interval(confidence)]
        p = float(test.pvalue)
    return dict(
        mean=statistics.mean(differences),
        interval=interval,
        p=p,
        positive=sum(x > 0 for x in differences),
    )
