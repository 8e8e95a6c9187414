"""k-NN is scikit-learn's on the same features."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ser_mm.evaluation import accuracy, knn_votes


def test_knn_is_that_of_scikit_learn(features):
    x, v, y, w = features
    votes = knn_votes(x, y, v, (10, 20, 100), temperature=0.07)
    for k in (10, 20, 100):
        classifier = KNeighborsClassifier(
            k, metric='cosine', weights=lambda distance: np.exp(-distance / 0.07)
        ).fit(x.numpy(), y.numpy())
        share = votes[k].softmax(dim=1).numpy()
        np.testing.assert_allclose(share, classifier.predict_proba(v.numpy()), atol=1e-4)
        expected = classifier.score(v.numpy(), w.numpy())
        assert accuracy(votes[k], w)['top1'] == pytest.approx(expected, abs=1e-9)
