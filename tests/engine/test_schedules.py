"""Schedules last as long as the run."""

import pytest
from mmengine.config import Config

from ser_mm.engine.schedules import follow_max_epochs
from tests.support.paths import ROOT


def followed(name, epochs):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    before = [dict(s) for s in cfg.param_scheduler]
    cfg.train_cfg.max_epochs = epochs
    follow_max_epochs(cfg)
    return before, [dict(s) for s in cfg.param_scheduler]


@pytest.mark.parametrize('name', ['mocov3_vits16', 'dino_vits16', 'demo/ser_mocov3'])
def test_as_written_nothing_changes(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    before, after = followed(name, cfg.train_cfg.max_epochs)
    assert before == after


@pytest.mark.parametrize('epochs', [50, 300])
def test_the_end_follows_and_the_warm_up_stays(epochs):
    _, after = followed('dino_vits16', epochs)
    warm_up, cosine, weight_decay = after
    assert (warm_up['begin'], warm_up['end']) == (0, 10)
    assert (cosine['begin'], cosine['end'], cosine['T_max']) == (10, epochs, epochs - 10)
    assert (weight_decay['begin'], weight_decay['end'], weight_decay['T_max']) == (
        0,
        epochs,
        epochs,
    )


def test_a_warm_up_that_does_not_fit_keeps_its_share():
    _, after = followed('mocov3_vits16', 8)
    assert [(s['begin'], s['end']) for s in after] == [(0, 1), (1, 8)]
    _, after = followed('mocov3_vits16', 1)  # a tenth of an epoch is none
    assert [(s['begin'], s['end'], s['T_max']) for s in after] == [(0, 1, 1)]


@pytest.mark.parametrize(
    'schedules',
    [
        [dict(type='LinearLR', end=20), dict(type='CosineAnnealingLR', begin=20)],
        [dict(type='LinearLR', end=5), dict(type='MultiStepLR', end=90, milestones=[30, 60])],
        [dict(type='LinearLR', start_factor=0.001, end=5)],
    ],
    ids=['cosine without end', 'milestones', 'alone'],
)
def test_a_warm_up_is_never_taken_for_the_whole(schedules):
    """As in MMPretrain's own schedules: the warm-up lasted as long as the run."""
    cfg = Config(dict(train_cfg=dict(max_epochs=300), param_scheduler=schedules))
    follow_max_epochs(cfg)
    assert [dict(s) for s in cfg.param_scheduler] == schedules


def test_what_is_the_authors_stays():
    """Milestones, schedules by iteration and open ends."""
    schedules = [
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
        dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11]),
        dict(type='CosineAnnealingLR', T_max=5),
    ]
    cfg = Config(dict(train_cfg=dict(max_epochs=24), param_scheduler=schedules))
    follow_max_epochs(cfg)
    assert cfg.param_scheduler == schedules


def test_loops_by_iteration_have_schedules_by_iteration():
    """Trained on at the last value."""
    warm_up = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)
    cosine = dict(type='CosineAnnealingLR', by_epoch=False, begin=500, end=2000, T_max=1500)
    train_cfg = dict(type='IterBasedTrainLoop', max_iters=3000)
    cfg = Config(dict(train_cfg=train_cfg, param_scheduler=[warm_up, cosine]))
    follow_max_epochs(cfg)
    assert cfg.param_scheduler == [warm_up, dict(cosine, end=3000, T_max=2500)]


def test_a_schedule_by_epoch_in_a_loop_by_iteration_is_refused():
    """It never moved; one that is converted does."""
    cosine = dict(type='CosineAnnealingLR', T_max=5)
    cfg = Config(dict(train_cfg=dict(by_epoch=False, max_iters=50), param_scheduler=cosine))
    with pytest.raises(ValueError, match='CosineAnnealingLR counts epochs.*max_iters=50'):
        follow_max_epochs(cfg)
    cfg.param_scheduler.convert_to_iter_based = True
    follow_max_epochs(cfg)
    assert cfg.param_scheduler.T_max == 5
