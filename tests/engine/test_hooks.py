"""Hooks in runs of a few steps."""

import pytest
import torch
from mmengine.hooks import Hook

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


@pytest.fixture
def cudnn_attention():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_attention_of_changing_lengths_is_not_by_cudnn(imagenet_tree, tmp_path, cudnn_attention):
    for ratio in (0, 0.5):
        short_run.run(
            ALGORITHMS['mocov3'],
            short_run.equivariant_views(ratio),
            imagenet_tree,
            tmp_path / str(ratio),
            epochs=1,
            hooks=[dict(type='EquivariantSplitHook')],
        )
        assert cudnn_attention() == (not ratio)


class Watch(Hook):
    """In each iteration a random number, and the temperature of DINO's teacher."""

    def __init__(self):
        self.draws, self.temperatures = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.draws.append(torch.rand(()).item())
        if hasattr(runner.model.algorithm, 'teacher'):
            head = runner.model.algorithm.head
            self.temperatures.append(head.current_teacher_temperature())


def by_iteration(root, folder, max_iters, name='dino', resume_from=None, hooks=()):
    """Epochs of 4 iterations, as there are 16 images, in a loop that knows no epochs."""
    watch = Watch()
    _, states = short_run.run(
        ALGORITHMS[name],
        short_run.equivariant_views(0.5),
        root,
        folder,
        hooks=[watch, *hooks],
        loop=dict(by_epoch=False, max_iters=max_iters),
        checkpoint=dict(type='CheckpointHook', interval=5, by_epoch=False),
        resume_from=resume_from,
    )
    return watch, states


def test_dino_thaws_and_warms_up_in_a_loop_by_iteration(imagenet_tree, tmp_path):
    """Its last layer stayed frozen, and its temperature at the start, for the whole run."""
    freeze = dict(type='FreezeLayerHook', layer='neck.last_layer', epochs=2)
    watch, states = by_iteration(imagenet_tree, tmp_path, 12, hooks=[freeze])
    names = [key for key in states[0] if key.startswith('neck.last_layer')]
    moves = [
        i
        for i in range(1, 13)
        if any(not torch.equal(states[i][name], states[i - 1][name]) for name in names)
    ]
    assert moves == [9, 10, 11, 12]  # after two epochs
    # From 0.04 to 0.07 in the 10 epochs of the warm-up, so in 9 steps.
    expected = [0.04 + epoch * 0.03 / 9 for epoch in (0, 1, 2) for _ in range(4)]
    assert watch.temperatures == pytest.approx(expected)


def test_the_data_of_a_resumed_loop_by_iteration_are_not_those_of_its_start(
    imagenet_tree, tmp_path
):
    """The same images came back with the same crops."""
    seen = []

    class Keep(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(data_batch['inputs'][0])

    by_iteration(imagenet_tree, tmp_path / 'whole', 8, 'simsiam', hooks=[Keep()])
    start = len(seen)
    by_iteration(
        imagenet_tree,
        tmp_path / 'rest',
        8,
        'simsiam',
        tmp_path / 'whole' / 'iter_5.pth',
        hooks=[Keep()],
    )
    rest = seen[start:]
    assert len(rest) == 3
    for batch in rest:
        assert not any(torch.equal(batch, other) for other in seen[:5])


def test_a_resumed_loop_by_iteration_does_not_repeat_its_draws(imagenet_tree, tmp_path):
    whole, _ = by_iteration(imagenet_tree, tmp_path / 'whole', 8, 'simsiam')
    rest, _ = by_iteration(
        imagenet_tree, tmp_path / 'rest', 8, 'simsiam', tmp_path / 'whole' / 'iter_5.pth'
    )
    assert len(set(whole.draws)) == 8
    assert rest.draws == whole.draws[5:]


def test_views_on_the_device_are_told_and_checked_before_training(imagenet_tree, tmp_path):
    def run(ratio, views=None, name='simsiam'):
        model = short_run.on_device(ALGORITHMS[name], ratio)
        folder = tmp_path / f'{ratio}'
        short_run.run(model, views, imagenet_tree, folder, 1, batch_size=8, log_level='INFO')
        return next(folder.glob('*/*.log')).read_text()

    told = 'b2 has 3 of the 8 images of a batch (equi_ratio=0.4), dealt over 1 rank(s).'
    assert told in run(0.4)
    assert 'b2 has' not in run(0)
    with pytest.raises(ValueError, match='SERDataPreprocessor: equi_ratio=0.1 .* 8 images is 1 in'):
        run(0.1)
    with pytest.raises(ValueError, match='views are made here, and by EquivariantViewPipeline'):
        run(0.5, short_run.equivariant_views(0.5))
