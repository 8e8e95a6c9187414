import numpy as np
import pytest

from ser_mm.evaluation.tsne import measure_classes


def test_numbers_of_known_maps():
    """NumPy draws the same numbers on every processor; of noise, half the neighbours agree."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    noise = rng.normal(size=(1000, 2))
    apart = measure_classes(noise + 1000 * labels[:, None], labels)
    assert apart['agreement'] == 1 and apart['silhouette'] > 0.99
    mixed = measure_classes(noise, labels)
    assert mixed['agreement'] == pytest.approx(0.5, abs=0.05)
    assert mixed['silhouette'] == pytest.approx(0, abs=0.01)
