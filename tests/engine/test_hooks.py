"""Hooks in runs of a few steps."""

import pytest
import torch

from tests.support import short_run
from tests.support.algorithms import ALGORITHMS

WEIGHT = {
    'mocov3': ('backbone.layers.0.attn.qkv.weight', 'momentum_encoder.module.0'),
    'byol': ('backbone.layers.0.attn.qkv.weight', 'target_net.module.0'),
    'dino': ('backbone.layers.0.attn.qkv.weight', 'teacher.module.0'),
}


@pytest.mark.parametrize('name', WEIGHT)
def test_the_momentum_branch_moves_once_per_optimizer_step(name, imagenet_tree, tmp_path):
    """12 passes, 4 of which make a step: before the hook it moved in each of them."""
    online, branch = WEIGHT[name]
    average = f'{branch}.{online.removeprefix("backbone.")}'
    _, states = short_run.run(
        ALGORITHMS[name],
        short_run.equivariant_views(0.5),
        imagenet_tree,
        tmp_path,
        epochs=3,
        hooks=[dict(type='MomentumUpdateHook')],
        optim=dict(accumulative_counts=4),
    )
    assert len(states) == 13

    def moves(key):
        return [i for i in range(1, 13) if not torch.equal(states[i][key], states[i - 1][key])]

    assert moves(online) == [4, 8, 12]  # after the 4th, 8th and 12th pass
    assert moves(average) == [1, 5, 9]  # a copy at first, then in the pass after that
