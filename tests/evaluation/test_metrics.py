import pytest
import torch

from ser_mm.evaluation import accuracy


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
