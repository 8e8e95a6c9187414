"""Accuracies with confidence intervals."""

from typing import Any

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
