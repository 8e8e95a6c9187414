import shutil

import cv2
import pytest
from mmengine.config import Config

from tests.support.command import run_command
from tests.support.probed import config, write_checkpoint


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp('checkpoint') / 'epoch_1.pth')


@pytest.mark.parametrize(
    'options', [('--k', '0'), ('--epochs', '0'), ('--temperature', '-1'), ('--lrs', '0')]
)
def test_numbers_that_make_no_sense(options, capsys):
    assert run_command('probe', 'a.py', 'b.pth', *options) == 2
    assert f'argument {options[0]}: {options[1]} is not positive' in capsys.readouterr().err


def test_command_reports_and_speaks_one_sentence(imagenet_tree, checkpoint, tmp_path, capsys):
    cfg = tmp_path / 'config.py'
    config(imagenet_tree).dump(cfg)
    places = ('--cache-dir', tmp_path / 'cache', '--out', tmp_path / 'out')
    threads = cv2.getNumThreads()
    cv2.setNumThreads(3)
    assert run_command('probe', cfg, checkpoint, '--epochs', 2, '--k', 1, *places) is None
    assert cv2.getNumThreads() == 1  # as in training
    cv2.setNumThreads(threads)
    results = Config.fromfile(tmp_path / 'out' / 'probe.json').results
    assert results['1-NN'].top1 == 1 and results['linear probe'].images == 16
    assert '| 1-NN' in capsys.readouterr().out

    def refusal(*options, checkpoint=checkpoint):
        code = run_command('probe', cfg, checkpoint, *options, *places)
        assert code.startswith('error: ') and '\n' not in code
        return code

    missing = refusal('--cfg-options', 'evaluation.val.data_root=nowhere')
    assert "evaluation.val.data_root = 'nowhere'" in missing
    assert 'none.pth' in refusal(checkpoint='none.pth')
    assert 'evaluation.val is not in' in refusal('--cfg-options', 'evaluation.val=None')
    other = tmp_path / 'other'
    (other / 'train' / 'n1').mkdir(parents=True)
    shutil.copy(next(imagenet_tree.glob('train/*/*')), other / 'train' / 'n1')
    odd = refusal('--cfg-options', f'evaluation.val.data_root={other}')
    assert 'different classes: n00000000 and 4 more' in odd
