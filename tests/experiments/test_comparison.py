"""Arms of a comparison on generated images in Tiny ImageNet's layout."""

import json

import pytest

from ser_mm.evaluation.robustness import CORRUPTIONS
from ser_mm.experiments.comparison import COLUMNS, MEASURES, report_comparison
from tests.support.command import run_command
from tests.support.tiny_imagenet import write_tiny_imagenet

CONFIG = 'tiny_imagenet/ser_mocov3_tiny_imagenet_short'


def results(**values):
    """A run of each arm and seed, by the values of its probe."""
    runs = [
        dict(arm=arm, seed=seed, probe=value)
        for arm, found in values.items()
        for seed, value in enumerate(found)
    ]
    return dict(runs=runs)


def test_differences_are_paired_by_seed():
    """Arms that differ less than seeds do."""
    text = report_comparison(results(baseline=[0.1, 0.2, 0.3], SER=[0.11, 0.22, 0.33]))
    assert '| linear probe | 0.200 ± 0.100 | 0.220 ± 0.110 |' in text
    # 0.02 ± 4.3027 x 0.01 / sqrt(3), by a table of Student's t
    assert '| SER - baseline |    mean |      95 % interval |     p | positive |' in text
    assert '| linear probe   | +0.0200 | -0.0048 to +0.0448 | 0.074 |   3 of 3 |' in text


def test_arm_of_other_seeds_is_shown_and_not_compared():
    found = results(baseline=[0.1, 0.2], SER=[0.3])
    found['runs'][-1]['seed'] = 7
    text = report_comparison(found)
    assert '| runs         |             2 |     1 |' in text and 'SER - baseline' not in text


@pytest.mark.slow
def test_whole_chain_goes_on_where_it_was(tmp_path, capsys):
    root = write_tiny_imagenet(tmp_path / 'tiny', classes=5, per_class=20)
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=20',
        f'train_dataloader.dataset.dataset.data_root={root}',
        f'train_dataloader.dataset.folder={tmp_path / "cached"}',
        f'evaluation.train.data_root={root}',
        f'evaluation.val.data_root={root}',
        'default_hooks.logger.interval=1',
        'model.data_preprocessor.equi_ratio=0.2',
    ]
    places = ['--work-dir', tmp_path / 'runs', '--out', tmp_path / 'out']
    command = ['--config', CONFIG, '--images', 3, *places, '--cfg-options', *options]
    arms = ['untrained', 'baseline', 'views_only', 'ser']
    few = ['--arms', *arms, '--measures', 'accuracy', 'cost', '--seeds']
    assert run_command('compare', *few, 0, *command) is None
    file = tmp_path / 'out' / 'mocov3_tiny_imagenet_short.json'
    first = json.loads(file.read_text())
    assert [run['arm'] for run in first['runs']] == ['untrained', 'baseline', 'views only', 'SER']
    by_arm = {run['arm']: run for run in first['runs']}
    assert all(0 <= run['probe'] <= 1 for run in first['runs'])
    assert [x['step'] for x in by_arm['SER']['losses']] == [1, 2, 3, 4, 5]
    assert {'loss', 'loss_inv', 'loss_ser'} <= by_arm['SER']['losses'][0].keys()
    assert by_arm['SER']['gflops'] > by_arm['baseline']['gflops'] > 0

    capsys.readouterr()
    measures = ['--measures', *(x for x in MEASURES if x != 'boxes')]
    assert run_command('compare', '--arms', 'ser', '--seeds', 0, *measures, *command) is None
    told = capsys.readouterr().out
    assert '1 runs, 0 to train' in told
    assert 'train: features' in told  # those of the probe are still there for the corruptions
    (run,) = json.loads(file.read_text())['runs']
    assert run['losses'] == by_arm['SER']['losses'] and run['probe'] == by_arm['SER']['probe']
    assert set(run['corruptions_by_kind']) == set(CORRUPTIONS)
    assert all(len(x) == 5 for x in run['corruptions_by_kind'].values())
    assert COLUMNS.keys() - run.keys() == {'box_map'}
    assert not list(tmp_path.glob('runs/*/*/ser.features'))
    assert {x.name for x in file.parent.glob('*.png')} == {
        'mocov3_tiny_imagenet_short_angles.png',
        'mocov3_tiny_imagenet_short_blocks.png',
    }

    capsys.readouterr()
    assert run_command('compare', '--tables', file) is None
    assert capsys.readouterr().out.strip() == file.with_suffix('.md').read_text().strip()
