"""The command ser-mm, and what all of its commands have in common."""

import re
import subprocess
import sys

import pytest

from ser_mm.cli.main import COMMANDS, main
from tests.support.command import run_command
from tests.support.paths import ROOT


def ser_mm(*args):
    try:
        main(args)
    except SystemExit as end:
        return end.code


def test_commands_are_listed_with_a_line_each(capsys):
    assert ser_mm('--help') == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert sum(
            re.fullmatch(rf'  {name} +{re.escape(text)}', line) is not None for line in lines
        )
    modules = {file.stem for file in (ROOT / 'ser_mm' / 'cli').glob('[a-z]*.py')} - {'main'}
    assert modules == {name.replace('-', '_') for name in COMMANDS}


@pytest.mark.parametrize('name', COMMANDS)
def test_every_option_has_a_help_text(name, capsys):
    assert ser_mm(name, '--help') == 0
    text = capsys.readouterr().out
    assert text.startswith(f'usage: ser-mm {name} ')
    # argparse indents help by more than the options, on their line or on the next ones.
    options = re.split(r'^  (?=\S)', text.partition('positional arguments:\n')[2], flags=re.M)
    without = [item for item in options if item and len(re.split(r'\s{2,}', item.strip())) < 2]
    assert without == []


def test_an_unknown_command_is_one_sentence(capsys):
    assert ser_mm('tain') == 2
    assert capsys.readouterr().err == (
        "ser-mm: error: unknown command 'tain'; did you mean train?\n"
    )
    assert ser_mm('xyz') == 2
    assert 'choose one of pretrain, train, ' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['probe', 'robustness'])
def test_an_unknown_config_is_one_sentence(name):
    assert run_command(name, 'ser_mocov3_vit16', 'x.pth').startswith(
        "error: config 'ser_mocov3_vit16': neither a file nor the name of a shipped config; close "
        'to it: ser_mocov3_vits16, ser_mocov3_vitb16, '
    )


MISTAKES = {
    'absent checkpoint to resume from': (
        ['train', 'demo/ser_mocov3', '--resume', 'nope.pth'],
        '--resume nope.pth is not a file; name a checkpoint, or leave the name out',
    ),
    'a field that no class takes': (
        ['train', 'demo/ser_mocov3', '--cfg-options', 'train_cfg.max_epoch=1'],
        'has no field max_epoch; did you mean train_cfg.max_epochs?',
    ),
    'a field that another class took': (
        [
            'train',
            'demo/ser_mocov3',
            '--cfg-options',
            'model.algorithm.backbone.type=VisionTransformer',
        ],
        "got an unexpected keyword argument 'stop_grad_conv1'",
    ),
    'fewer images than a batch': (
        [
            'train',
            'demo/ser_mocov3',
            '--cfg-options',
            'train_dataloader.dataset.train_per_picture=1',
            'train_dataloader.dataset.val_per_picture=1',
        ],
        'train_dataloader.batch_size = 128, but the 18 images of the data set',
    ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command, *args), message = MISTAKES[name]
    found = run_command(command, *args)
    assert found.startswith('error: ') and message in found and '\n' not in found


@pytest.mark.parametrize('name', ['train', 'probe'])
def test_an_option_that_sets_nothing(name, capsys):
    assert ser_mm(name, 'a', *(['b'] if name == 'probe' else []), '--cfg-options', 'foo') == 2
    assert 'error: --cfg-options foo: give KEY=VALUE.' in capsys.readouterr().err


NUMBERS = {
    'probe a b --lrs 0.1 inf': 'argument --lrs: inf is not finite',
    'probe a b --temperature nan': 'argument --temperature: nan is not positive',
    'probe a b --num-workers -1': 'argument --num-workers: -1 is negative',
    'equivariance a.py b --num-workers -1': 'argument --num-workers: -1 is negative',
    'tsne a b --perplexity inf': 'argument --perplexity: inf is not finite',
    'ablate temperature --values nan': 'argument --values: nan is not finite',
}


@pytest.mark.parametrize('line', NUMBERS)
def test_numbers_that_cannot_be_meant(line, capsys):
    assert ser_mm(*line.split()) == 2
    assert NUMBERS[line] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('command', [['-m', 'ser_mm.cli.cost'], ['tools/cost.py']])
def test_module_and_tool_are_the_command(command):
    run = subprocess.run(
        [sys.executable, *command, 'none'], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 2
    assert 'ser-mm cost: error: config ' in run.stderr
