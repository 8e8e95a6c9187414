"""What the repository declares agrees with what it holds."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mmpretrain
import pytest
import yaml
from mmpretrain.apis.model import ModelHub
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ser_mm
from ser_mm.engine.operators import read_config, require_operators
from tests.support.paths import ROOT

# Import names of packages that only some commands, transforms or tests need.
OPTIONS = ['imagecorruptions', 'mmdet', 'onnx', 'onnxruntime', 'onnxscript', 'pyarrow']
OPTIONS += ['pycocotools', 'safetensors', 'timm']


def declared():
    return [Requirement(line) for line in importlib.metadata.requires('ser_mm')]


def imports(folder):
    """Top-level names that the sources import, at the top or inside of functions."""
    for path in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.split('.')[0]


def test_every_import_is_declared():
    providers = importlib.metadata.packages_distributions()
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    # MMCV brings OpenCV, by one of its two packages.
    for name in set(imports('ser_mm')) - sys.stdlib_module_names - {'ser_mm', 'cv2'}:
        assert names & set(map(canonicalize_name, providers[name])), name


def test_pinned_releases_are_within_what_is_declared():
    lines = (line.partition('#')[0].strip() for line in (ROOT / 'requirements.txt').open())
    pins = [Requirement(line) for line in lines if line]
    declarations = {canonicalize_name(requirement.name): requirement for requirement in declared()}
    for pin in pins:
        wanted = declarations.get(canonicalize_name(pin.name))
        for release in pin.specifier if wanted else ():
            assert wanted.specifier.contains(release.version), (str(pin), str(wanted))


def test_import_asks_for_the_declared_releases():
    """Those of OpenMMLab go by two names each; the last of the first releases are the oldest."""
    lowest = {
        canonicalize_name(requirement.name): [
            spec.version for spec in requirement.specifier if spec.operator == '>='
        ]
        for requirement in declared()
    }
    names = {'mmcv': 'mmcv-lite'}
    for name, (needed, install) in ser_mm._NEEDED.items():
        assert lowest[names.get(name, name)] == [needed], name
        assert Requirement(install.partition("'")[0]).specifier.contains(needed), install


@pytest.mark.parametrize('name', ser_mm._NEEDED)
def test_older_release_is_told_at_import(name, monkeypatch):
    for release in ('99.0', '2.11.0+cu130', '2.7.0a0+git1234567'):
        monkeypatch.setattr(importlib.import_module(name), '__version__', release)
        ser_mm._check_releases()
    needed, _ = ser_mm._NEEDED[name]
    monkeypatch.setattr(importlib.import_module(name), '__version__', '0.9.9+cu1')
    told = f'{name} >= {needed}, but {name} 0.9.9+cu1 is installed: run `pip install '
    with pytest.raises(ImportError, match=re.escape(told)):
        ser_mm._check_releases()


@pytest.mark.parametrize('name', ser_mm._NEEDED)
def test_absent_package_is_told_at_import(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f'ser_mm needs {name} >= .*not installed: run `pip inst'):
        ser_mm._check_releases()


@pytest.mark.slow
def test_import_needs_no_options():
    hide = f'import sys; sys.modules.update(dict.fromkeys({OPTIONS}))'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', f'{hide}; import ser_mm, ser_mm.cli.main'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_commits_are_formatted_by_the_pinned_ruff():
    pins = (ROOT / 'requirements.txt').read_text().split()
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos'][0]['hooks']
    needed = {package for hook in hooks for package in hook['additional_dependencies']}
    assert {package for package in needed if package.startswith('ruff')} <= set(pins)


def test_names_of_configs_are_unique():
    """Those who give a name alone, as mim takes it, get one file."""
    names = Counter(path.name for path in (ROOT / 'configs').rglob('*.py'))
    assert [name for name, count in names.items() if count > 1] == []


def test_pretraining_configs_are_models_of_mmpretrain():
    configs = {path.stem: str(path) for path in (ROOT / 'configs').glob('*.py')}
    listed = set(mmpretrain.list_models())  # and MMPretrain's own, which may lie below ROOT too
    ours = {
        name: model.config
        for name, model in ModelHub._models_dict.items()
        if (ROOT / 'configs') in Path(str(model.config)).parents
    }
    assert ours == configs
    assert set(configs) <= listed


def test_operators_are_looked_for_first(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)  # ends its import
    with pytest.raises(ImportError, match='the thing needs .* not installed: run `make env-oper'):
        require_operators('the thing')
    for name in ('retinanet_r50', 'demo/detection'):
        with pytest.raises(ImportError, match='Detection needs .*make env-operators'):
            read_config(name)
    of_a_user = tmp_path / 'of_a_user.py'
    of_a_user.write_text("_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']")
    with pytest.raises(ImportError, match='of_a_user.py needs .*make env-operators'):
        read_config(of_a_user)
    assert read_config('ser_mocov3').model.type == 'SERAlgorithm'


def test_detection_without_mmdet_is_told_where_it_is(monkeypatch):
    pytest.importorskip('mmcv._ext')
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    with pytest.raises(ImportError, match='needs MMDetection.*pip install onedl-mmdetection'):
        require_operators('the thing')
