"""A run that goes on from a checkpoint is the run that was not interrupted."""

import copy

import pytest
import torch

from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE


@pytest.mark.parametrize('name', ALGORITHMS)
def test_resumed_run_goes_as_the_uninterrupted_one(name, imagenet_tree, tmp_path):
    """Bit by bit after every step: weights, momentum branch, schedules and random draws.

    Both runs call the same operations on the same numbers in the same shapes.
    """
    config = copy.deepcopy(ALGORITHMS[name])
    if config['algorithm']['backbone']['type'] == 'SERVisionTransformer':
        config['algorithm']['backbone'] = dict(BACKBONE, drop_path_rate=0.2)
    views = short_run.equivariant_views(equi_ratio=0.5)
    _, whole = short_run.run(config, views, imagenet_tree, tmp_path / 'whole')
    checkpoint = tmp_path / 'whole' / 'epoch_1.pth'
    _, resumed = short_run.run(
        config, views, imagenet_tree, tmp_path / 'resumed', resume_from=checkpoint
    )
    assert (len(whole), len(resumed)) == (1 + 2 * 4, 1 + 4)
    for state, other in zip(whole[-4:], resumed[-4:], strict=True):
        assert [k for k in state if not torch.equal(state[k], other[k])] == []
    assert any(not torch.equal(whole[-5][k], whole[-1][k]) for k in whole[-1] if 'ser_neck' in k)
