import numpy as np
import pytest
import torch

from tests.support.probed import write_checkpoint


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """Random weights that fit ``tests.support.probed.config``."""
    return write_checkpoint(tmp_path_factory.mktemp('checkpoint') / 'epoch_1.pth')


@pytest.fixture(scope='session')
def features():
    """Features of six classes that overlap, so that a regression on them has a finite optimum.

    Training and validation features (N, 4), then training and validation labels.
    """
    rng = np.random.default_rng(0)
    means = rng.normal(scale=0.8, size=(6, 4))

    def draw(count):
        labels = np.arange(count) % 6
        noisy = means[labels] + rng.normal(size=(count, 4))
        return torch.from_numpy(noisy).float(), torch.from_numpy(labels)

    (x, y), (v, w) = draw(720), draw(360)
    return x, v, y, w
