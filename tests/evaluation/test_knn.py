"""k-NN is scikit-learn's on the same features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from ser_mm.evaluation import accuracy, knn_votes
from ser_mm.evaluation.knn import few_shot


def test_knn_is_that_of_scikit_learn(features):
    """Where rounding decides neither who is a neighbour nor which class has the most votes.

    A similarity in float32 takes some 15 operations one after the other, so it is off by 1e-6, and
    a vote by 1e-6 / 0.07 of itself.
    """
    x, v, y, w = features
    similarity = F.normalize(v.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    nearest = similarity.sort(dim=1, descending=True).values
    votes = knn_votes(x, y, v, (10, 20, 100), temperature=0.07)
    for k in (10, 20, 100):
        classifier = KNeighborsClassifier(
            k, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07)
        ).fit(x.double().numpy(), y.numpy())
        expected = torch.from_numpy(classifier.predict_proba(v.double().numpy()))
        first, second = expected.topk(2, dim=1).values.T
        clear = (nearest[:, k - 1] - nearest[:, k] > 1e-5) & (first - second > 1e-3)
        assert clear.double().mean() > 0.9
        share = votes[k].softmax(dim=1)[clear]
        torch.testing.assert_close(share, expected[clear], rtol=0, atol=1e-4)
        hits = (expected.argmax(dim=1) == w)[clear]
        assert accuracy(votes[k][clear], w[clear])['top1'] == int(hits.sum()) / len(hits)


def test_few_shot_is_that_of_scikit_learn(features):
    """Where all images of each class are drawn, in any order."""
    x, v, y, w = features
    images = torch.cat([(y == i).nonzero().flatten()[:7] for i in range(6)])
    found = few_shot(x[images], y[images], v, w, [7], draws=3, ks=[2])
    assert list(found[7]) == [2, 7]
    for k, result in found[7].items():
        classifier = KNeighborsClassifier(
            k, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07)
        ).fit(x[images].double().numpy(), y[images].numpy())
        expected = float((classifier.predict(v.double().numpy()) == w.numpy()).mean())
        # Rounding in float32 may decide on a vote or two.
        assert result['mean'] == pytest.approx(expected, abs=2.5 / len(v))
        assert np.ptp(result['top1']) <= 2 / len(v) + 1e-9


def apart(sizes):
    """Training images that each find themselves and, that taken away, one of the next class.

    Training features and labels, and queries for them.
    """
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    own = torch.eye(len(labels))
    train = torch.cat([own, 0.1 * F.one_hot(labels)], dim=1)
    queries = torch.cat([own, 0.1 * F.one_hot((labels + 1) % len(sizes))], dim=1)
    return train, labels, queries


def test_as_many_of_each_class_are_drawn():
    """So many are right as were drawn, of each class; with more, the same and others."""
    train, labels, queries = apart([4, 9, 5])
    for label, size in enumerate((4, 9, 5)):
        own = labels == label
        found = few_shot(train, labels, queries[own], labels[own], [1, 3], draws=5, ks=[1])
        assert found[1][1]['top1'] == [1 / size] * 5
        assert found[3][1]['top1'] == [3 / size] * 5
    hits = np.array(
        [
            [few_shot(train, labels, query, label, [1, 3], 8, [1])[n][1]['top1'] for n in (1, 3)]
            for query, label in zip(queries[:, None], labels[:, None], strict=True)
        ]
    )
    assert (hits[:, 1] >= hits[:, 0]).all()
    assert len({tuple(draw) for draw in hits[:, 1].T}) > 4  # draws differ


def test_floor_and_ceiling_of_few_shot():
    labels = torch.arange(5).repeat(6)
    train = F.one_hot(labels).float()
    for n, some in few_shot(train, labels, train, labels, [1, 2, 6], 3, [1, 20]).items():
        assert list(some) == sorted({1, n})
        for result in some.values():
            assert result['top1'] == [1] * 3 and result['interval'] == [1, 1]
    (some,) = few_shot(train, labels, train.roll(1, 0), labels, [2], 3, []).values()
    assert some[2]['mean'] == 0


def test_shots_named_twice_are_drawn_once():
    train, labels, queries = apart([4, 9, 5])
    once = few_shot(train, labels, queries, labels, [1, 3], 3)
    assert few_shot(train, labels, queries, labels, [1, 3, 3], 3) == once


def test_few_shot_refuses():
    train, labels, queries = apart([4, 9, 5])
    with pytest.raises(ValueError, match='shots=5: class 0 has 4 training images'):
        few_shot(train, labels, queries, labels, [1, 5])
    with pytest.raises(ValueError, match='draws=1'):
        few_shot(train, labels, queries, labels, [1], draws=1)


def test_a_number_named_twice_votes_once_and_no_vote_is_too_small():
    """At a small temperature all votes were 0, and any class the first."""
    rng = torch.Generator().manual_seed(0)
    train, labels = torch.randn(40, 8, generator=rng), torch.arange(40) % 4
    val = train + 0.5 * torch.randn(40, 8, generator=rng)
    nearest = knn_votes(train, labels, val, [1])[1].argmax(1)
    cold = knn_votes(train, labels, val, [10, 10], temperature=1e-5)
    assert list(cold) == [10] and torch.equal(cold[10].argmax(1), nearest)
