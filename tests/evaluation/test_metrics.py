import math

import numpy as np
import pytest
import torch
from scipy import stats

from ser_mm.evaluation import accuracy
from ser_mm.evaluation.metrics import mean_interval, paired_difference, rank_me, tell_unseen


def test_accuracy_and_its_interval():
    scores = torch.eye(10)[[0, 1, 2, 3, 4, 5, 6, 7, 9, 9]]
    result = accuracy(scores, torch.arange(10))
    assert result['top1'] == 0.9 and result['images'] == 10
    scores[9] = torch.nan
    result = accuracy(scores, torch.arange(10))
    assert result['top1'] == 0.8
    # Wilson's interval for 8 of 10, by its formula.
    z, p, n = 1.959964, 0.8, 10
    centre, half = (p + z * z / 2 / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
    assert result['top1_ci'] == pytest.approx(expected, abs=1e-6)
    votes = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert accuracy(votes, torch.tensor([1]))['top5'] == 0


def test_classes_without_training_images_are_told():
    """They lowered an accuracy without a word."""
    assert tell_unseen(torch.tensor([0, 1, 1]), torch.tensor([1, 0])) == []
    (told,) = tell_unseen(torch.tensor([0, 1, 1]), torch.tensor([1, 3, 0, 2, 3]))
    assert told.startswith('3 of 5 validation images are of 2 classes without a training image, ')
    assert told.endswith('cannot be above 0.4000.')


def test_rank_of_features():
    assert rank_me(torch.eye(8)) == pytest.approx(8, abs=1e-4)  # its ceiling
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=1e-4)  # and its floor
    # Singular values 3 and 1, by hand: shares 3/4 and 1/4.
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, abs=1e-5)
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert rank_me(5 * features) == pytest.approx(rank_me(features), rel=1e-9)


def test_paired_difference():
    """Beside Student's table, and his distribution in closed form for three degrees of freedom."""
    one, other = [0.61, 0.58, 0.66, 0.60], [0.59, 0.57, 0.60, 0.61]
    found = paired_difference(one, other)
    differences = np.array([0.02, 0.01, 0.06, -0.01])
    reach = 3.182446 * differences.std(ddof=1) / 2
    assert found['mean'] == pytest.approx(0.02) and found['positive'] == 3
    assert found['interval'] == pytest.approx([0.02 - reach, 0.02 + reach], abs=1e-7)
    x = 0.02 / (differences.std(ddof=1) / 2) / np.sqrt(3)
    assert found['p'] == pytest.approx(1 - 2 / np.pi * (x / (1 + x * x) + np.arctan(x)))
    with pytest.raises(ValueError, match='give two or more'):
        paired_difference([1.0], [2.0])
    # Rounded figures: a deviation of 0, or of the rounding of floats, would be certainty.
    for equal in ([0.161, 0.162], [0.158, 0.159]), ([0.2, 0.2], [0.2, 0.2]), ([0.0, 0], [0.0, 0]):
        found = paired_difference(*equal)
        assert found['mean'] == pytest.approx(equal[0][0] - equal[1][0])
        assert all(map(math.isnan, [*found['interval'], found['p']]))


def test_mean_and_its_interval():
    found = mean_interval([0.61, 0.58, 0.66, 0.60])
    expected = stats.ttest_1samp([0.61, 0.58, 0.66, 0.60], 0).confidence_interval(0.95)
    assert found['mean'] == pytest.approx(0.6125)
    assert found['interval'] == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert mean_interval([1.0, 1.0]) == dict(mean=1, interval=[1, 1])
    with pytest.raises(ValueError, match='give two or more'):
        mean_interval([1.0])
