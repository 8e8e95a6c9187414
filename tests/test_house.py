"""The house: which room may use which, and what users could name that they can name still."""

import argparse
import ast
import importlib
import inspect
import json
import re

import mmengine.registry
import mmpretrain.registry
import pytest

import ser_mm  # noqa: F401  registers the modules
from ser_mm.engine.configs import find_config
from tests.support.paths import ROOT

PACKAGE = ROOT / 'ser_mm'
LAYERS = dict(
    cli=5,
    experiments=4,
    evaluation=3,
    engine=2,
    models=1,
    datasets=1,
    visualization=1,
    geometry=0,
    draws=0,
    files=0,
    progress=0,
    views=0,
    checkpoint=0,
    arguments=0,
)
"""Height of each module below ``ser_mm``; those on the same floor do not import each other."""

PUBLIC = json.loads((ROOT / 'tests' / 'support' / 'public.json').read_text())

# Names that are found in another place, where that cannot be helped.
MOVED = {
    # A launcher that reads a log needs no matplotlib, and drawing may not import the engine.
    'ser_mm.visualization.read_scalars': 'ser_mm.engine.logs.read_scalars',
    # Was imported there for its own use.
    'ser_mm.evaluation.equivariance.spaced_images': 'ser_mm.evaluation.data.spaced_images',
    'ser_mm.evaluation.equivariance.token_maps_of': 'ser_mm.evaluation.token_maps_of',
    # Data sets and transforms, which `import ser_mm` is to register.
    'ser_mm.evaluation.robustness.Corrupt': 'ser_mm.datasets.Corrupt',
    'ser_mm.evaluation.robustness.SequenceFolder': 'ser_mm.datasets.SequenceFolder',
}
# One config per detector and backbone: the checkpoint and its cls_layer are options.
MERGED = re.compile(r'coco/([a-z-]+)_(?:ser_)?mocov3_(vits16|r50)\.py')


def sources(folder):
    return sorted((ROOT / folder).rglob('*.py'))


def imported(path):
    """Full names of the modules and objects that a file of a package imports, wherever in it."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            base += [node.module] if node.module else []
            yield from ('.'.join([*base, alias.name]) for alias in node.names)


def room(name):
    """What is directly below ``ser_mm`` in a full name."""
    return name.split('.')[1] if name.startswith('ser_mm.') else None


@pytest.mark.parametrize('path', sources('ser_mm'), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = path.relative_to(PACKAGE).with_suffix('').parts[0]
    if own == '__init__':  # imports all, to register it
        return
    for name in imported(path):
        other = room(name)
        if other in LAYERS and other != own:
            assert LAYERS[other] < LAYERS[own], f'{own} imports {name}'
        elif name == 'ser_mm' or (other and other not in LAYERS):
            assert own == 'cli', f'{own} imports {name}'  # which shows the version


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).with_suffix('').parts[0] for path in sources('ser_mm')}
    assert rooms == {*LAYERS, '__init__'}


def test_only_commands_parse_and_exit():
    for path in sources('ser_mm'):
        if path.is_relative_to(PACKAGE / 'cli'):
            continue
        assert 'argparse' not in {name.split('.')[0] for name in imported(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            named = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ''
            assert named not in ('sys.exit', 'os._exit', 'SystemExit', 'exit', 'quit'), path


def test_tests_do_not_lean_on_each_other():
    for path in sources('tests'):
        assert 'sys.path.insert' not in path.read_text() or path.name == 'test_house.py', path
        for name in imported(path):
            assert name.split('.')[0] != 'runpy', path
            parts = name.split('.')
            assert not any(part.startswith('test_') for part in parts), f'{path} imports {name}'
            assert parts[0] != 'tests' or parts[1] in ('support', 'conftest'), path


@pytest.mark.parametrize('name', PUBLIC['commands'])
def test_options_are_there_still(name, monkeypatch):
    class Parsed(Exception):
        pass

    def stop(parser, *args):
        raise Parsed(parser)

    for parse in ('parse_args', 'parse_intermixed_args'):
        monkeypatch.setattr(argparse.ArgumentParser, parse, stop)
    with pytest.raises(Parsed) as end:
        importlib.import_module(f'ser_mm.cli.{name}').parse_args([])
    (parser,) = end.value.args
    positional = [action.dest for action in parser._actions if not action.option_strings]
    options = {option for action in parser._actions for option in action.option_strings}
    assert positional == [x for x in PUBLIC['commands'][name] if not x.startswith('-')]
    assert options >= {x for x in PUBLIC['commands'][name] if x.startswith('-')}
    assert (ROOT / 'tools' / f'{name}.py').is_file()


def test_files_and_targets_are_there_still():
    for folder, names in dict(tools=PUBLIC['scripts'], benchmarks=PUBLIC['benchmarks']).items():
        assert [name for name in names if not (ROOT / folder / name).is_file()] == []
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    assert set(PUBLIC['make']) <= set(targets)
    for name in PUBLIC['configs']:
        merged = MERGED.fullmatch(name)
        assert find_config(f'coco/{merged[1]}_{merged[2]}' if merged else name).is_file()


@pytest.mark.parametrize('module', PUBLIC['names'])
def test_names_are_there_still(module):
    for name in PUBLIC['names'][module]:
        place, _, found = MOVED.get(f'{module}.{name}', f'{module}.{name}').rpartition('.')
        assert hasattr(importlib.import_module(place), found), f'{place}.{found}'


@pytest.mark.parametrize('name', PUBLIC['registered'])
def test_registered_types_take_what_they_took(name):
    registries = {
        id(value): value
        for module in (mmengine.registry, mmpretrain.registry)
        for value in vars(module).values()
        if isinstance(value, mmengine.registry.Registry)
    }
    found = {
        id(r.module_dict[name]): r.module_dict[name]
        for r in registries.values()
        if name in r.module_dict
    }
    (kind,) = (x for x in found.values() if x.__module__.startswith('ser_mm.'))
    parameters = inspect.signature(kind).parameters
    before = PUBLIC['registered'][name]
    assert [x for x in parameters if x in before] == before  # all, in this order
    for new in parameters.keys() - set(before):
        needed = parameters[new].default is inspect.Parameter.empty
        assert not needed or parameters[new].kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ), f'{name} needs {new}'
