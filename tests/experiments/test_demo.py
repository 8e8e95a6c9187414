"""The demo: a first table before its last arm, and results as published."""

import json
import math

import pytest

from ser_mm.experiments.demo import COLUMNS, summarize
from tests.support.command import run_command
from tests.support.paths import ROOT

RESULTS = ROOT / 'docs' / 'results' / 'demo'


@pytest.mark.parametrize('algorithm', ['mocov3', 'dino', 'barlowtwins'])
def test_published_tables_follow_from_their_results(algorithm):
    content = json.loads((RESULTS / algorithm / 'results.json').read_text())
    published = (RESULTS / algorithm / 'table.md').read_text()
    assert published.startswith(summarize(content['results']))


def test_other_settings_of_the_last_arm_are_refused_before_training(tmp_path):
    kept = tmp_path / 'mocov3' / 'seed0' / 'views_only.py'
    kept.parent.mkdir(parents=True)
    kept.write_text("default_scope = 'mmpretrain'")
    assert 'views_only holds a run with other settings' in run_command(
        'demo', '--work-dir', tmp_path
    )
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.slow
def test_demo_from_training_to_pictures(tmp_path, capsys):
    data = dict(data_root=tmp_path / 'photos', train_per_picture=8, val_per_picture=4)
    options = {
        f'{place}.{key}': value
        for place in ('train_dataloader.dataset', 'evaluation.train', 'evaluation.val')
        for key, value in data.items()
    }
    options |= {'train_dataloader.batch_size': 36, 'default_hooks.logger.interval': 1}
    args = ['--epochs', 2, '--seeds', 3, '--work-dir', tmp_path, '--cfg-options']
    args += [f'{key}={value}' for key, value in options.items()]
    assert run_command('demo', *args) is None
    printed = capsys.readouterr().out
    first, rest = printed.split('First table, of seed 3')
    assert 'views only' not in first
    rows = [line.split('|')[1].strip() for line in rest.splitlines() if line.startswith('| ')]
    assert rows[2:6] == ['untrained', 'baseline', 'SER', '']  # and the head of the next table
    out = tmp_path / 'mocov3'
    content = json.loads((out / 'results.json').read_text())
    assert content['seeds'] == [3]
    assert list(content['results']) == ['untrained', 'baseline', 'views only', 'SER']
    for name, runs in content['results'].items():
        assert [list(run) for run in runs] == [list(COLUMNS)]
        assert math.isnan(runs[0]['step']) == (name == 'untrained')
        kept = json.loads((out / 'seed3' / f'{name.replace(" ", "_")}.json').read_text())
        assert runs[0]['rot90'] == kept['layers']['rot90'][1]['r2']
    assert '2 epochs, seeds [3].' in (out / 'table.md').read_text()
    for name in ('losses', 'views', 'token_maps'):
        assert (out / f'{name}.png').stat().st_size > 10000

    # What is there is neither trained nor measured again.
    times = {file: file.stat().st_mtime_ns for file in out.glob('seed*/*.json')}
    assert len(times) == 4
    assert run_command('demo', *args) is None
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert 'features of' not in capsys.readouterr().out
