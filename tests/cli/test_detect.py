"""ser-mm detect."""

import pytest

from ser_mm.cli.detect import parse_args
from tests.support.command import run_command
from tests.support.own_boxes import write_own_boxes

FILES = ['faster-rcnn_tiny', '--train', 'train.json', '--val', 'val.json', '--images', 'photos']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['SER=a.pth', 'SER=b.pth'], '--backbones: SER stands twice'),
        (['a.pth'], 'a.pth: give NAME=CHECKPOINT'),
        (['SER='], 'SER=: give NAME=CHECKPOINT'),
        (['SER=a.pth', '--shares', '0'], '0 is not positive'),
        (['SER=a.pth', '--modes', 'half'], "invalid choice: 'half'"),
    ],
)
def test_a_slip_is_told_with_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args([*FILES, '--backbones', *arguments])
    assert message in capsys.readouterr().err


def test_an_equals_sign_may_be_part_of_a_path():
    assert parse_args([*FILES, '--backbones', 'a=x=1/b.pth']).backbones == [('a', 'x=1/b.pth')]


def test_a_missing_checkpoint_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(write_own_boxes(tmp_path / 'own'))
    sentence = run_command('detect', *FILES, '--backbones', 'SER=none.pth')
    assert sentence.startswith('error: backbones: SER=none.pth is not a file')
    assert '\n' not in sentence
    assert not (tmp_path / 'own' / 'work_dirs').exists()
