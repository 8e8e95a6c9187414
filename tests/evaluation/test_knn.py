"""k-NN is scikit-learn's on the same features."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from ser_mm.evaluation import accuracy, knn_votes


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
