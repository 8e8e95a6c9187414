"""The commands of README and docs: all are listed, with what runs them, and all can be run.

What their Python takes from this package is there.
"""

import ast
import importlib.util
import re
import subprocess
from functools import cache

import pytest

from ser_mm.cli.main import COMMANDS as OURS
from ser_mm.engine.configs import find_config, shipped_configs
from tests.support.documented import COMMANDS
from tests.support.pages import blocks
from tests.support.paths import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
TUTORIALS = ROOT / 'docs' / 'tutorials'
LISTED = [command for commands in COMMANDS.values() for command in commands]
# A shell that tells the arguments of what begins with one of these words instead of running it.
TELL = 'tell() { printf "%s\\0" "$@"; echo; }; '
RUN = re.compile(r'(\w+=\S+ )*(ser-mm|tools/dist_train\.sh|tools/dist_test\.sh)\b')
ASSIGNMENTS = re.compile(r'(\w+=\S+ ?)+')


def commands_of(text):
    """Commands of a block, without comments and breaks within them."""
    for line in text.replace('\\\n', ' ').splitlines():
        command = ' '.join(re.sub(r'(^|\s)#.*', '', line).split())
        if command:
            yield command


@cache
def documented():
    """Page, assignments before it and command, for every command of ours."""
    found = []
    for page in PAGES:
        for language, text, _ in blocks(page):
            before = ''
            for command in commands_of(text) if language == 'bash' else ():
                if ASSIGNMENTS.fullmatch(command):
                    before += f'{command}; '
                else:
                    found.append((page, before, command))
    return found


def test_every_command_is_listed_once_with_what_runs_it():
    """A new one belongs into tests/support/documented.py."""
    ours = {command for page, _, command in documented() if page.parent != TUTORIALS}
    assert ours - set(LISTED) == set(), 'not listed'
    assert set(LISTED) - ours == set(), 'in no page'
    assert len(LISTED) == len(set(LISTED))


def test_what_runs_them_is_there():
    for where in COMMANDS:
        for file, function in re.findall(r'(tests/\S+\.py)::(\w+)', where):
            assert re.search(rf'^def {function}\(', (ROOT / file).read_text(), re.M), where
        assert '::' in where or where.startswith(('needs ', 'is ', 'installs ')), where


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, tmp_path, monkeypatch):
    """Options, names of shipped configs, scripts and targets of make exist."""
    monkeypatch.chdir(tmp_path)
    for folder in ('imagenet-c', 'imagenet-p', 'shapes'):  # looked for at once
        (tmp_path / 'data' / folder).mkdir(parents=True)
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    for _, before, command in (x for x in documented() if x[0] == page):
        if RUN.match(command):
            assert_parses(before, command)
        for file in re.findall(r'(?<!/)\b(?:benchmarks|tools)/\w+\.\w+', command):
            assert (ROOT / file).is_file(), command
        for target in re.findall(r'^make ([\w-]+)', command):
            assert target in targets, command


def assert_parses(before, command):
    words = RUN.sub(lambda match: f'tell {match[2]}', command)
    words = re.sub(r'\bCONFIG\b', 'ser_mocov3_vits16', words)
    shell = ['bash', '-c', f'{TELL}{before}{words}']
    told = subprocess.run(shell, capture_output=True, text=True, check=True)
    program, *args = told.stdout.rstrip('\n').split('\0')[:-1]
    if program == 'ser-mm':
        name, *args = args
        assert name in OURS, command
    else:
        script = re.search(r'SCRIPT=(\w+)\.py', command)
        name = script[1] if script else 'test' if 'dist_test' in program else 'train'
        del args[2 if name == 'test' else 1]  # the number of processes
    try:
        importlib.import_module(f'ser_mm.cli.{name.replace("-", "_")}').parse_args(args)
    except SystemExit as end:
        pytest.fail(f'{command}: {end}')
    for word in args:
        if word.startswith('configs/') and word.endswith('.py'):
            assert find_config(word), command
    first = args[0] if args else ''
    if name in ('train', 'probe', 'dense', 'export', 'embed', 'cost') and '/' not in first:
        own = first.endswith('.py') or not first or first.startswith('-')
        assert own or any(x.endswith(first) for x in shipped_configs()), command


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_imports_what_there_is(page):
    for language, text, line in blocks(page):
        for node in (
            ast.walk(ast.parse(text, f'{page.name}:{line}')) if language == 'python' else ()
        ):
            if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'ser_mm':
                module = importlib.import_module(node.module)
                for name in node.names:
                    full = f'{node.module}.{name.name}'
                    assert hasattr(module, name.name) or importlib.util.find_spec(full), full
