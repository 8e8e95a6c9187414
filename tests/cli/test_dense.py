import json

import pytest

from ser_mm.cli.dense import parse_args
from tests.support.command import run_command
from tests.support.probed import config, write_checkpoint


@pytest.fixture
def run(imagenet_tree, tmp_path):
    """Config and checkpoint of a tiny network."""
    config(imagenet_tree).dump(tmp_path / 'config.py')
    return tmp_path / 'config.py', write_checkpoint(tmp_path / 'epoch_1.pth')


def test_results_are_written(run, tmp_path, capsys):
    out = tmp_path / 'found' / 'a.json'
    options = ['--images', 3, '--step', 90, '--affine', 1, '--layers', 2, 4, '--out', out]
    assert run_command('dense', *run, '--measures', 'correspondence', *options) is None
    results = json.loads(out.read_text())
    assert results['checkpoint'] == run[1] and results['step'] == 90
    assert list(results['results']) == ['layers', 'correspondence']
    assert results['results']['layers'] == [2, 4]
    text = out.with_suffix('.md').read_text()
    assert '| matched by angle | block 2 | block 4 |' in text
    assert text in capsys.readouterr().out


def test_mistakes_are_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('ser_mm.evaluation.dense.accuracy_by_angle', None)  # that takes longest
    assert run_command('dense', *run, '--out', tmp_path) == 2
    assert 'name a file that ends in .json.' in capsys.readouterr().err
    found = run_command('dense', *run, '--layers', 9, '--out', tmp_path / 'a.json')
    assert found.startswith('error: layers=[9]: the network has 4') and '\n' not in found


def test_the_checkpoint_may_come_after_options():
    """As in what tools/dist_train.sh runs."""
    args = parse_args(['a.py', '--launcher', 'pytorch', 'x.pth', '--layers', '1', '2'])
    assert (args.config, args.checkpoint, args.layers) == ('a.py', 'x.pth', [1, 2])
    assert parse_args(['a.py', '--launcher', 'pytorch']).checkpoint is None


def test_images_without_labels(imagenet_tree, run, tmp_path):
    """Labels are needed for accuracy only."""
    (images,) = (path for path in imagenet_tree.glob('train/*') if path.name.endswith('1'))
    options = ['--data', images, '--images', 2, '--step', 180, '--out', tmp_path / 'a.json']
    found = run_command('dense', *run, *options)
    assert found.startswith('error: --data') and 'labels are needed' in found
    found = run_command('dense', *run, *options, '--measures', 'position', 'correspondence')
    assert found is None
    assert 'angle' not in json.loads((tmp_path / 'a.json').read_text())['results']


def test_an_interrupted_command_goes_on(run, tmp_path, monkeypatch, capsys):
    options = ['--images', 2, '--train-images', 8, '--step', 180, '--affine', 1]
    options += ['--measures', 'position', 'correspondence']
    out = ['--out', tmp_path / 'b.json']
    assert run_command('dense', *run, *options, '--out', tmp_path / 'a.json') is None

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr('ser_mm.evaluation.dense.position_by_layer', interrupted)
        assert run_command('dense', *run, *options, *out) == 130
    assert 'the same command continues' in capsys.readouterr().err
    assert [x.name for x in tmp_path.glob('b.*')] == ['b.correspondence.kept']
    monkeypatch.setattr('ser_mm.evaluation.dense.correspondence_by_layer', interrupted)
    assert run_command('dense', *run, *options, *out) is None
    assert 'correspondence: taken from' in capsys.readouterr().out
    for suffix in ('.json', '.md'):
        assert (tmp_path / f'a{suffix}').read_text() == (tmp_path / f'b{suffix}').read_text()
