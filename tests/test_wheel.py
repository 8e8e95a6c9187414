"""A wheel does what the checkout does, where nothing of the checkout is to be found."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ser_mm
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# Ends the import of what detection needs, as if it were not installed.
WITHOUT_DETECTION = "import sys; sys.modules['mmcv._ext'] = sys.modules['mmdet'] = None"
SMALL = ('train_per_picture=4', 'val_per_picture=2', 'data_root=photos')


def run(*command, cwd, ok=True):
    # Nothing of the checkout on the path, and the console scripts of the new environment.
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def of_photos(*keys):
    return [f'{key}.{option}' for key in keys for option in SMALL]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from the source archive, so that one is complete, too."""
    folder = tmp_path_factory.mktemp('dist')
    build = f'from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})'
    run(sys.executable, '-c', build, cwd=ROOT)
    (archive,) = folder.glob('*.tar.gz')
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '-w', folder]
    run(*pip, '--no-deps', '--no-index', '--no-build-isolation', archive, cwd=folder)
    (found,) = folder.glob('*.whl')
    return found


@pytest.fixture(scope='module')
def bin_folder(wheel, tmp_path_factory):
    """Scripts of a new environment: the wheel, and the other packages of this environment.

    The borrowed packages come by a line in a .pth file, which does not process the .pth files
    there: the editable ser_mm stays unknown. What detection needs is hidden.
    """
    folder = tmp_path_factory.mktemp('environment') / 'venv'
    run(sys.executable, '-m', 'venv', folder, cwd=folder.parent)
    python = folder / 'bin' / 'python'
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', wheel, cwd=folder)
    (site,) = folder.glob('lib/python*/site-packages')
    borrowed = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    (site / 'borrowed.pth').write_text('\n'.join(borrowed))
    (site / 'sitecustomize.py').write_text(WITHOUT_DETECTION)
    return python.parent


def test_wheel_holds_configs_tools_and_index(wheel):
    there = {
        name.partition('/.mim/')[2]
        for name in zipfile.ZipFile(wheel).namelist()
        if name.startswith('ser_mm/.mim/')
    }
    here = {
        path.relative_to(ROOT).as_posix()
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts and path.name != 'setup_env.sh'
    }
    assert there == here | {'model-index.yml'}
    assert 'ser_mm/py.typed' in zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split('-')[1] == ser_mm.__version__


def test_lists_and_builds_models_by_name(bin_folder, tmp_path):
    told = run(
        bin_folder / 'python',
        '-c',
        'import ser_mm, mmpretrain\n'
        'from ser_mm.engine.configs import find_config\n'
        'names = mmpretrain.list_models("*ser_*")\n'
        'print(ser_mm.__file__, *(find_config(name) for name in names), sep="\\n")\n'
        'print(type(mmpretrain.get_model("ser_mocov3_vits16")).__name__, *names)',
        cwd=tmp_path,
    )
    *files, last = told.splitlines()[-2 - len(list((ROOT / 'configs').glob('ser_*.py'))) :]
    assert all(Path(file).is_relative_to(bin_folder.parent) for file in files)
    model, *names = last.split()
    assert model == 'SERAlgorithm'
    assert names == sorted(path.stem for path in (ROOT / 'configs').glob('ser_*.py'))


def test_trains_and_probes(bin_folder, tmp_path):
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=40',
        *of_photos('train_dataloader.dataset'),
    ]
    ser_mm_command = bin_folder / 'ser-mm'
    run(ser_mm_command, 'train', 'ser_mocov3', '--cfg-options', *options, cwd=tmp_path)
    checkpoint = tmp_path / 'work_dirs/ser_mocov3/epoch_1.pth'
    options = of_photos('evaluation.train', 'evaluation.val')
    probe = [ser_mm_command, 'probe', 'ser_mocov3', checkpoint, '--epochs', '1', '--k', '1']
    told = run(*probe, '--cfg-options', *options, cwd=tmp_path)
    assert 'linear' in told and '%' in told


def test_detection_names_what_it_lacks(bin_folder, tmp_path):
    told = run(bin_folder / 'ser-mm', 'train', 'retinanet_r50', cwd=tmp_path, ok=False)
    assert "needs mmcv's compiled operators" in told and 'make env-operators' in told
    assert 'Traceback' not in told
