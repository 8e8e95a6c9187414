"""Every shipped recipe trains, and those of a pair differ in SER alone."""

import os
import re
import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from ser_mm.engine.cpu import adapt_to_device
from ser_mm.evaluation.backbone import build_model
from tests.support.paths import ROOT
from tests.support.small_images import write_cifar, write_stl10
from tests.support.tiny_imagenet import write_tiny_imagenet

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# Sizes of images and of projectors, and what they are shortened to.
SHORTER = {
    'train_dataloader': {224: 64, 96: 32},
    'model': {4096: 64, 8192: 64, 65536: 64},
}


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
        assert cfg.train_dataloader.dataset.pipeline[1].type == 'EquivariantViewPipeline'
        options.append('train_dataloader.dataset.pipeline.1.equi_ratio=0.5')
    return cfg, options


def train_two_steps(config, work_dir, options):
    """What an epoch of two steps prints."""
    command = [sys.executable, '-m', 'ser_mm.cli.train', config, '--work-dir', work_dir]
    run = subprocess.run(
        [*command, '--cfg-options', *options],
        cwd=ROOT,
        env={'OMP_NUM_THREADS': '1', **os.environ},
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    losses = re.findall(r'Epoch\(train\) \[1\]\[([12])/2\].* loss: (-?[\d.]+)', run.stdout)
    assert [step for step, _ in losses] == ['1', '2'], run.stdout
    return run.stdout


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
    told = train_two_steps(config, tmp_path, options)
    name = {'SERAlgorithm': 'loss_ser', 'EquivarianceAlgorithm': 'loss_equi'}.get(cfg.model.type)
    for term in ('loss_ser', 'loss_equi'):
        values = re.findall(rf' {term}: (-?[\d.]+)', told)
        assert len(values) == 2 * (term == name)
        assert not values or any(float(value) > 0 for value in values)


TINY = sorted((ROOT / 'configs/tiny_imagenet').glob('*_tiny_imagenet*.py'))


@pytest.mark.slow
@pytest.mark.parametrize('config', TINY, ids=lambda path: path.stem)
def test_tiny_imagenet_trains(config, tmp_path):
    root = write_tiny_imagenet(tmp_path / 'tiny', classes=2, per_class=8)
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=8',
        f'train_dataloader.dataset.dataset.data_root={root}',
        f'train_dataloader.dataset.folder={tmp_path / "cached"}',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=100',
        'default_hooks.checkpoint.save_last=False',
    ]
    if config.name.startswith('ser_'):
        options.append('model.data_preprocessor.equi_ratio=0.5')
    told = train_two_steps(config, tmp_path / 'run', options)
    assert len(re.findall(r' loss_ser: \d', told)) == 2 * config.name.startswith('ser_')


SMALL = sorted((ROOT / 'configs/small_images').glob('*.py'))


@pytest.mark.slow
@pytest.mark.parametrize('config', SMALL, ids=lambda path: path.stem)
def test_small_images_train(config, tmp_path):
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=8',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=100',
        'default_hooks.checkpoint.save_last=False',
        f'train_dataloader.dataset.data_root={tmp_path / "data"}',
    ]
    if 'stl10' in config.stem:
        write_stl10(tmp_path / 'data', images=16)
    else:  # whose sums MMPretrain checks
        write_cifar(tmp_path / 'data', images=16)
        options.append('train_dataloader.dataset.type=OwnCIFAR')
        file = tmp_path / config.name
        imports = dict(imports=['tests.support.small_images'])
        file.write_text(f'_base_ = [{str(config)!r}]\ncustom_imports = {imports}\n')
        config = file
    if config.name.startswith('ser_'):
        options.append('model.data_preprocessor.equi_ratio=0.5')
    told = train_two_steps(config, tmp_path / 'run', options)
    assert len(re.findall(r' loss_ser: \d', told)) == 2 * config.name.startswith('ser_')


def test_small_images_are_given_to_all_that_reads_them():
    for name, kind, patch in (
        ('cifar10', 'CIFAR10', 4),
        ('cifar100', 'CIFAR100', 4),
        ('stl10', 'STL10', 12),
    ):
        cfg = Config.fromfile(ROOT / f'configs/small_images/mocov3_{name}.py')
        read = cfg.train_dataloader, *({'dataset': x} for x in cfg.evaluation.values())
        sets = [loader['dataset'] for loader in (*read, cfg.test_dataloader)]
        assert {x.type for x in sets} == {kind} and len({x.data_root for x in sets}) == 1
        assert [x.split for x in sets[1:]] == ['train', 'test', 'test']
        assert not cfg.model.data_preprocessor.to_rgb  # their pixels are in that order
        crops = {view[0].scale for view in cfg.model.data_preprocessor.views}
        assert crops == {cfg.model.backbone.img_size} == {8 * patch}
        assert cfg.model.backbone.patch_size == patch


@pytest.mark.parametrize(
    'name',
    [
        *(f'tiny_imagenet/{x}_tiny_imagenet' for x in ('mocov3', 'dino', 'barlowtwins')),
        *(f'small_images/mocov3_{x}' for x in ('cifar10', 'cifar100', 'stl10')),
    ],
)
def test_pair_of_small_images_differs_in_the_ser_lines_only(name):
    base = Config.fromfile(ROOT / f'configs/{name}.py').to_dict()
    ser = Config.fromfile(ROOT / f'configs/{name.replace("/", "/ser_")}.py').to_dict()
    algorithm = ser['model'].pop('algorithm')
    assert algorithm['backbone'].pop('ser_layer') == 3
    assert base.pop('model') == algorithm
    assert ser.pop('model')['data_preprocessor'] == dict(equi_ratio=1 / 32)
    assert base == {key: x for key, x in ser.items() if key != 'algorithm'}


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
    assert base['model'] == algorithm

    load, views, pack = base['train_dataloader']['dataset'].pop('pipeline')
    load_ser, views_ser, pack_ser = ser['train_dataloader']['dataset'].pop('pipeline')
    assert (load, pack) == (load_ser, pack_ser)
    assert (views.pop('type'), views_ser.pop('type')) == (
        'FastMultiView',
        'EquivariantViewPipeline',
    )
    assert views_ser.pop('equi_ratio') == 0.01
    assert views == views_ser

    keys = base.get('optim_wrapper', {}).get('paramwise_cfg', {}).get('custom_keys', {})
    ser_keys = ser['optim_wrapper'].get('paramwise_cfg', {}).get('custom_keys', {})
    for name in set(ser_keys) - set(keys):
        assert name.startswith('ser_neck') and ser_keys.pop(name)
    rest = base.keys() - {'model', 'train_pipeline'}
    assert {key: base[key] for key in rest} == {key: ser[key] for key in rest}


ADDONS = 'augself', 'equimod', 'stl', 'essl'


@pytest.mark.parametrize('name', ADDONS)
def test_other_methods_differ_in_their_lines_only(name):
    """On the policy and the algorithm of the baseline, in the original and the decoupled form."""
    base = Config.fromfile(ROOT / 'configs/mocov3_vits16.py').to_dict()
    path = ROOT / f'configs/{name}_mocov3_vits16.py'
    own = Config.fromfile(path).to_dict()
    moved = Config.fromfile(path.with_name(f'{path.stem}_layer3.py')).to_dict()
    backbone = moved['model']['algorithm']['backbone']
    assert (backbone.pop('ser_layer'), backbone.pop('cls_layer')) == (3, 0)
    assert moved == own
    assert own['model']['algorithm'] == base['model']
    load, views, pack = base['train_dataloader']['dataset'].pop('pipeline')
    load_own, views_own, pack_own = own['train_dataloader']['dataset'].pop('pipeline')
    assert (load, pack) == (load_own, pack_own)
    assert views_own['equi_ratio'] == 0
    for key in ('num_views', 'transforms'):
        assert views_own[key] == views[key]
    rest = base.keys() - {'model', 'train_pipeline'}
    assert {key: base[key] for key in rest} == {key: own[key] for key in rest}


def code_lines(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith('#')]


def test_ser_configs_hold_what_is_theirs():
    """A SER config inherits its baseline; what it adds fits on a few lines."""
    paths = [*(ROOT / 'configs').glob('ser_*.py'), *(ROOT / 'configs/demo').glob('ser_*.py')]
    lines = {path.stem: code_lines(path) for path in paths}
    assert len(paths) == 16 and sum(map(len, lines.values())) <= 172
    assert len(lines['ser_mocov3_vits16']) <= 14
    assert all(len(line) <= 100 for found in lines.values() for line in found)


def test_values_of_ser_are_visible():
    """In the config that a run writes down, not only in the defaults of classes."""
    text = Config.fromfile(ROOT / 'configs/ser_mocov3_vits16.py').pretty_text
    for value in ('equi_ratio=0.01', 'temperature=0.5', 'loss_weight=1.0', 'ser_layer=3'):
        assert value in text.replace(' ', '')


def test_names_are_unique():
    names = [path.name for path in (ROOT / 'configs').rglob('*.py')]
    assert len(names) == len(set(names))


LARS = [path for path in CONFIGS if 'LARS' in str(Config.fromfile(path).optim_wrapper)]


@pytest.mark.parametrize('config', LARS, ids=lambda path: path.stem)
def test_norms_and_biases_have_one_learning_rate(config):
    """Also those of SER's projector; LARS adapts the rate of the other parameters alone."""
    cfg = Config.fromfile(config)
    options = {path: 64 for path, value in walk(cfg.model, 'model') if value in SHORTER['model']}
    cfg.merge_from_dict(options)
    adapt_to_device(cfg)
    wrapper = build_optim_wrapper(build_model(cfg), cfg.optim_wrapper)
    groups = [g for g in wrapper.optimizer.param_groups if g['params'][0].requires_grad]
    excluded = [g for g in groups if g['params'][0].ndim == 1]
    assert len(excluded) < len(groups)
    assert all(g['lars_exclude'] and g['weight_decay'] == 0 for g in excluded)
    assert len({g['lr'] for g in excluded}) == 1
