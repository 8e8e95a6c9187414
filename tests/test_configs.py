"""Every shipped recipe trains, and those of a pair differ in SER alone."""

import os
import re
import subprocess
import sys

import pytest
from mmengine.config import Config

from tests.support.paths import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# Sizes of images and of projectors, and what they are shortened to.
SHORTER = {'train_dataloader': {224: 64}, 'model': {4096: 64, 8192: 64, 65536: 64}}


def walk(value, path):
    """Every number in a config, with its place as --cfg-options names it."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from walk(inner, f'{path}.{key}')
    elif isinstance(value, int):
        yield path, value


def shortened(config, data_root, batch_size):
    cfg = Config.fromfile(config)
    options = [
        'train_cfg.max_epochs=1',
        f'train_dataloader.batch_size={batch_size}',
        'train_dataloader.num_workers=0',
        f'train_dataloader.dataset.data_root={data_root}',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=100',
        'default_hooks.checkpoint.save_last=False',
    ]
    for part, sizes in SHORTER.items():
        for path, value in walk(cfg[part], part):
            if value in sizes:
                options.append(f'{path}={sizes[value]}')
    if cfg.train_dataloader.dataset.type == 'ImageNet':  # insists on its 1000 classes
        options.append('train_dataloader.dataset.metainfo.classes=[a,b,c,d]')
    if cfg.model.type == 'SERAlgorithm':
        assert cfg.train_pipeline[1]['type'] == 'EquivariantViewPipeline'
        options.append('train_dataloader.dataset.pipeline.1.equi_ratio=0.5')
    return cfg, options


@pytest.mark.slow
@pytest.mark.parametrize('config', [*CONFIGS, ROOT / 'README.md'], ids=lambda path: path.stem)
def test_trains(config, imagenet_tree, tmp_path):
    if config.suffix == '.md':
        code = re.search(
            r"```python\n(_base_ = \['mmpretrain::.*?)```", config.read_text(), re.DOTALL
        )
        config = tmp_path / 'of_a_user.py'
        config.write_text(code.group(1))
    cfg, options = shortened(config, imagenet_tree, batch_size=8)
    command = [sys.executable, ROOT / 'tools' / 'train.py', config, '--work-dir', tmp_path]
    run = subprocess.run(
        [*command, '--cfg-options', *options],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    steps = re.findall(r'Epoch\(train\) \[1\]\[([12])/2\].* loss: (-?[\d.]+)', run.stdout)
    assert [step for step, _ in steps] == ['1', '2'], run.stdout
    terms = re.findall(r' loss_ser: (-?[\d.]+)', run.stdout)
    if cfg.model.type == 'SERAlgorithm':
        assert len(terms) == 2 and any(float(term) > 0 for term in terms)
    else:
        assert not terms


PAIRS = [path for path in CONFIGS if path.with_name(f'ser_{path.name}') in CONFIGS]


def test_paper_and_resnets_have_pairs():
    names = {path.stem for path in PAIRS}
    for algorithm in ('mocov3', 'dino', 'barlowtwins'):
        assert f'{algorithm}_vits16' in names
    assert {'mocov3_r50', 'barlowtwins_r50'} <= names


@pytest.mark.parametrize('config', PAIRS, ids=lambda path: path.stem)
def test_pair_differs_in_the_ser_lines_only(config):
    base = Config.fromfile(config).to_dict()
    ser = Config.fromfile(config.with_name(f'ser_{config.name}')).to_dict()
    algorithm = ser['model']['algorithm']
    assert algorithm['backbone'].pop('ser_layer') == 3
    pixels = base['model'].pop('data_preprocessor')
    assert base['model'] == algorithm
    kept = {key: ser['model']['data_preprocessor'][key] for key in pixels if key != 'type'}
    assert kept == {key: value for key, value in pixels.items() if key != 'type'}

    load, views, pack = base['train_dataloader']['dataset'].pop('pipeline')
    load_ser, views_ser, pack_ser = ser['train_dataloader']['dataset'].pop('pipeline')
    assert (load, pack) == (load_ser, pack_ser)
    assert views['transforms'] == views_ser['views']
    # The shared crop and the photometry of b2 are those of b1.
    crop, flip = base.get('crop'), base.get('flip')
    for view, photometry in zip(views['transforms'], views_ser['equi_views'], strict=True):
        assert view == [crop, *photometry, flip]
    assert views_ser['equi_crop'] == [crop]

    keys = base.get('optim_wrapper', {}).get('paramwise_cfg', {}).get('custom_keys', {})
    ser_keys = ser['optim_wrapper'].get('paramwise_cfg', {}).get('custom_keys', {})
    for name in set(ser_keys) - set(keys):
        assert name.startswith('ser_neck') and ser_keys.pop(name)
    rest = base.keys() - {'model', 'train_pipeline'}
    assert {key: base[key] for key in rest} == {key: ser[key] for key in rest}
