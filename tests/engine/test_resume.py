"""A run that goes on from a checkpoint is the run that was not interrupted."""

import copy

import pytest
import torch
from mmengine.hooks import Hook
from mmpretrain.models import CosineEMA

from ser_mm.engine.resuming import ResumeError
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE
from tests.support.two_ranks import on_two_ranks

# The same arithmetic in both; what the issue asks for.
SAME = dict(rel=1e-12, abs=0)


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


class Seen(Hook):
    """What the model is given in each iteration: b1 and b2 of each view, and their elements."""

    def __init__(self):
        self.views = []

    def before_train(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        loss = model.loss

        def watched(inputs, *args, **kwargs):
            self.views.append([[x.base, x.equi, x.elements] for x in inputs])
            return loss(inputs, *args, **kwargs)

        model.loss = watched


def on_device(rank, root, folder, batch_size):
    """A whole run and the second half of it, with views made by the model."""
    config = short_run.on_device(ALGORITHMS['simsiam'], equi_ratio=3 / 8)
    runs = []
    for name, start in dict(whole=None, rest=folder / 'whole' / 'epoch_1.pth').items():
        seen = Seen()
        _, states = short_run.run(
            config,
            None,
            root,
            folder / name,
            resume_from=start,
            hooks=[seen],
            batch_size=batch_size,
        )
        runs.append((seen.views, states))
    return runs


def check_rest(whole, rest):
    (views, states), (views_of_rest, states_of_rest) = whole, rest
    half = len(views_of_rest)
    assert len(views) == 2 * half == len(states) - 1
    for state, other in zip(states[-half:], states_of_rest[-half:], strict=True):
        # Of a rank's own running statistics, which training does not use, the first's are kept.
        keys = [k for k in state if '.running_' not in k]
        assert [k for k in keys if not torch.equal(state[k], other[k])] == []
    for view, other in zip(views[half:], views_of_rest, strict=True):
        assert all(map(torch.equal, sum(view, []), sum(other, [])))
    assert not torch.equal(views[0][0][0], views[half][0][0])


def test_a_resumed_run_with_views_on_the_device_too(imagenet_tree, tmp_path):
    whole, rest = on_device(0, imagenet_tree, tmp_path, 8)
    check_rest(whole, rest)
    assert [len(view[1]) for views in whole[0] for view in views] == [3] * 8


@pytest.mark.slow
def test_and_on_two_ranks(imagenet_tree, tmp_path):
    """Of 8 images on two ranks 3 are in b2: two on the first, one on the second."""
    ranks = on_two_ranks(on_device, imagenet_tree, tmp_path, 4)
    for (whole, rest), count in zip(ranks, (2, 1), strict=True):
        check_rest(whole, rest)
        assert [len(view[1]) for views in whole[0] for view in views] == [count] * 8
    first, second = (whole[0][0][0][0] for whole, _ in ranks)
    assert not torch.equal(first[0], second[0])  # other images, and other draws


class Scheduled(Hook):
    """All that follows a schedule, in each iteration by its number."""

    def __init__(self):
        self.values, self.in_b2 = {}, set()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        groups = runner.optim_wrapper.param_groups
        values = [g[k] for g in groups for k in ('lr', 'weight_decay')]
        values += [g['betas'][0] for g in groups]
        model = getattr(runner.model, 'module', runner.model)
        values += [runner.optim_wrapper._inner_count, runner.max_iters]
        for module in model.modules():
            if isinstance(module, CosineEMA):
                average = torch.zeros((), dtype=torch.float64)
                module.avg_func(average, torch.ones_like(average), int(module.steps))
                values.append(average.item())
        if hasattr(model.algorithm, 'teacher'):
            values.append(model.algorithm.head.current_teacher_temperature())
        self.values[runner.iter] = values


def schedules(end, by_epoch=True):
    """Warm-up and cosine of the learning rate in steps, weight decay in epochs, momentum."""
    if not by_epoch:
        times = [dict(begin=0, end=3), dict(begin=3, end=end, T_max=end - 3), *[dict(end=end)] * 2]
    else:
        in_steps = dict(convert_to_iter_based=True)
        times = [
            dict(begin=0, end=1, **in_steps),
            dict(begin=1, end=end, T_max=end - 1, **in_steps),
            dict(end=end),
            dict(end=end, **in_steps),
        ]
    kinds = [
        dict(type='LinearLR', start_factor=0.1),
        dict(type='CosineAnnealingLR', eta_min=1e-5),
        dict(type='CosineAnnealingParamScheduler', param_name='weight_decay', eta_min=0.4),
        dict(type='LinearMomentum', start_factor=0.9, end_factor=0.5),
    ]
    kinds[2]['T_max'] = end
    pairs = zip(kinds, times, strict=True)
    return [dict(kind, **time, by_epoch=by_epoch) for kind, time in pairs]


OPTIM = dict(
    accumulative_counts=2,
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={'ser_neck': dict(lr_mult=0.5)}),
)


def values_of(root, folder, resume_from=None, end=4, name='dino', **kwargs):
    watch = Scheduled()
    if 'loop' not in kwargs:
        kwargs = dict(epochs=end, schedules=schedules(end)) | kwargs
    runner, _ = short_run.run(
        ALGORITHMS[name],
        short_run.equivariant_views(0.5),
        root,
        folder,
        resume_from=resume_from,
        hooks=[watch, dict(type='MomentumUpdateHook')],
        optim=OPTIM,
        **kwargs,
    )
    return watch.values


@pytest.fixture(scope='module')
def saved(imagenet_tree, tmp_path_factory):
    """A run of 4 epochs of 4 iterations, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp('saved')
    values_of(imagenet_tree, folder)
    return folder


@pytest.mark.parametrize(
    'change',
    [dict(end=6), dict(batch_size=8), dict(end=3, batch_size=6)],
    ids=str,
)
def test_what_follows_a_schedule_goes_as_in_a_run_of_the_new_length(
    change, saved, imagenet_tree, tmp_path
):
    """The saved schedule won, and the iteration stayed that of the other length."""
    whole = values_of(imagenet_tree, tmp_path / 'whole', **change)
    rest = values_of(imagenet_tree, tmp_path / 'rest', saved / 'epoch_2.pth', **change)
    length = len(whole) // change.get('end', 4)
    assert list(rest) == list(range(2 * length, len(whole)))
    for step, values in rest.items():
        assert values == pytest.approx(whole[step], **SAME)


def on_rank(rank, root, folder, checkpoint):
    return values_of(root, folder, checkpoint)


@pytest.mark.slow
def test_on_two_processes_at_the_same_share_of_the_training(saved, imagenet_tree, tmp_path):
    """Two of 4 images have the steps of one of 8; the rate was at its end after half of the run."""
    whole = values_of(imagenet_tree, tmp_path / 'whole', batch_size=8)
    for rest in on_two_ranks(on_rank, imagenet_tree, tmp_path / 'rest', saved / 'epoch_2.pth'):
        assert list(rest) == [4, 5, 6, 7]
        for step, values in rest.items():
            assert values == pytest.approx(whole[step], **SAME)


def test_a_changed_learning_rate_is_the_config_s(saved, imagenet_tree, tmp_path):
    """It was the saved one, without a word."""
    constant = [dict(type='ConstantLR', factor=0.5, end=1)]
    change = dict(schedules=constant, end=4)
    rest = values_of(imagenet_tree, tmp_path / 'rest', saved / 'epoch_3.pth', **change)
    whole = values_of(imagenet_tree, tmp_path / 'whole', **change)
    assert rest[12] == pytest.approx(whole[12], **SAME)


def loop(iterations):
    return dict(
        loop=dict(by_epoch=False, max_iters=iterations),
        schedules=schedules(iterations, by_epoch=False),
        checkpoint=dict(type='CheckpointHook', interval=5, by_epoch=False),
    )


def test_loops_by_iteration(imagenet_tree, tmp_path):
    values_of(imagenet_tree, tmp_path / 'saved', **loop(10), batch_size=8)
    checkpoint = tmp_path / 'saved' / 'iter_5.pth'
    # Longer; other images per step; and both, such that as many images are seen.
    for change, start in [
        (loop(14) | dict(batch_size=8), 5),
        (loop(10), 5),
        (loop(20), 10),
    ]:
        whole = values_of(imagenet_tree, tmp_path / 'whole', **change)
        rest = values_of(imagenet_tree, tmp_path / 'rest', checkpoint, **change)
        assert list(rest) == list(range(start, len(whole)))
        for step, values in rest.items():
            assert values == pytest.approx(whole[step], **SAME)
    with pytest.raises(
        ResumeError, match='max_iters=10 with 8 images .* max_iters=12 with 4.* 20 '
    ):
        values_of(imagenet_tree, tmp_path / 'rest', checkpoint, **loop(12))


def test_a_run_shorter_than_what_is_trained_is_refused(saved, imagenet_tree, tmp_path):
    with pytest.raises(ResumeError, match='trained for 3 epochs, and train_cfg.max_epochs=2'):
        values_of(imagenet_tree, tmp_path, saved / 'epoch_3.pth', end=2)


@pytest.mark.parametrize('how', ['resume_from', 'load_from'])
def test_weights_of_another_model_are_refused(how, saved, imagenet_tree, tmp_path):
    """MMEngine logs what does not fit, and trains from random weights."""
    other = copy.deepcopy(ALGORITHMS['simsiam'])
    other['algorithm']['backbone']['arch'] = dict(
        other['algorithm']['backbone']['arch'], feedforward_channels=72
    )
    views = short_run.equivariant_views(0.5)
    with pytest.raises(ResumeError, match=r'epoch_4.pth is not of this model: backbone\.layers'):
        short_run.run(other, views, imagenet_tree, tmp_path, **{how: saved / 'epoch_4.pth'})


def test_a_new_run_from_the_end_of_another(saved, imagenet_tree, tmp_path):
    """The average stays, and its momentum starts anew: it went on, from 0 upwards."""
    watch, states = Scheduled(), torch.load(saved / 'epoch_4.pth', weights_only=False)['state_dict']
    _, found = short_run.run(
        ALGORITHMS['dino'],
        short_run.equivariant_views(0.5),
        imagenet_tree,
        tmp_path,
        load_from=saved / 'epoch_4.pth',
        hooks=[watch],
        epochs=4,
    )
    moved = [values[-2] for values in watch.values.values()]
    assert len(moved) == 16 and moved == sorted(moved, reverse=True) and moved[-1] < moved[0]
    name = next(x for x in states if x.startswith('teacher.') and x.endswith('qkv.weight'))
    (steps,) = (x for x in states if x.startswith('teacher.') and x.endswith('steps'))
    assert int(found[0][steps]) == 1 and torch.equal(found[0][name], states[name])
    assert int(found[-1][steps]) == 17


def test_ends_in_other_units_are_refused(imagenet_tree, tmp_path):
    """A cosine of 8 iterations for 2 epochs of 4: with 8 images it would be left half-way."""
    cosine = [dict(type='CosineAnnealingLR', T_max=8, end=8, by_epoch=False)]
    warm_up = [dict(type='LinearLR', end=8, by_epoch=False)]
    for given in (cosine, warm_up):
        values_of(imagenet_tree, tmp_path / 'saved', end=2, schedules=given)
        change = dict(end=2, schedules=given, batch_size=8)
        args = (imagenet_tree, tmp_path / 'rest', tmp_path / 'saved' / 'epoch_1.pth')
        if given is warm_up:
            values_of(*args, **change)
        else:
            with pytest.raises(ResumeError, match=r"'lr' ends after 8 iters.* this run has 4\."):
                values_of(*args, **change)


def test_checkpoints_within_an_epoch(imagenet_tree, tmp_path):
    """One at its end was trained again, and one in it went on with iterations of the next."""
    by_step = dict(type='CheckpointHook', interval=2, by_epoch=False)
    whole = values_of(imagenet_tree, tmp_path / 'saved', end=2, checkpoint=by_step)
    for file, start in (('iter_4.pth', 4), ('iter_6.pth', 4), ('iter_8.pth', 8)):
        rest = values_of(imagenet_tree, tmp_path / 'rest', tmp_path / 'saved' / file, end=2)
        assert list(rest) == list(range(start, 8))
        for step, values in rest.items():
            assert values == pytest.approx(whole[step], **SAME)


def test_validation_results_cannot_be_replayed(imagenet_tree, tmp_path):
    plateau = [dict(type='ReduceOnPlateauLR', monitor='loss')]
    values_of(imagenet_tree, tmp_path / 'saved', end=2, schedules=plateau)
    checkpoint = tmp_path / 'saved' / 'epoch_1.pth'
    values_of(imagenet_tree, tmp_path / 'rest', checkpoint, end=3, schedules=plateau)
    with pytest.raises(ResumeError, match='ReduceOnPlateauLR, cannot go on'):
        values_of(
            imagenet_tree, tmp_path / 'rest', checkpoint, end=2, schedules=plateau, batch_size=8
        )
