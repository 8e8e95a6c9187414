"""Sweeps of settings: what they train, and that a sweep goes on after an interruption."""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ser_mm.engine.configs import find_config
from ser_mm.evaluation.backbone import build_model
from ser_mm.experiments.sweeps import costs, load_base, points, report_sweep, run_config
from tests.support.command import run_command
from tests.support.paths import ROOT


def folders(sweep, values=None, config='demo/ser_mocov3', **cfg_options):
    cfg = load_base(find_config(config), cfg_options)
    found = {}
    for value, point in points(cfg, sweep, values).items():
        own = run_config(cfg, point, 7, Path('work'), cfg_options)
        assert own.randomness.seed == 7
        found[value] = own
    return found


def test_all_arms_see_the_same_pixels():
    """The baseline kept the mean and std of its config, whatever SER's were set to."""
    options = {'model.data_preprocessor.mean': [1, 2, 3], 'model.data_preprocessor.std': [4, 5, 6]}
    for sweep in ('gradient', 'addons'):
        for name, cfg in folders(sweep, **options).items():
            preprocessor = build_model(cfg).data_preprocessor
            found = [x.flatten().tolist() for x in (preprocessor.mean, preprocessor.std)]
            assert found == [[1, 2, 3], [4, 5, 6]] and preprocessor._channel_conversion, name


def names(found):
    return {value: Path(cfg.work_dir).name for value, cfg in found.items()}


def test_the_ratio_of_views_on_the_device():
    """It is the preprocessor's, where the views are."""
    crop = dict(type='RandomResizedCrop', scale=48, backend='pillow')
    options = {
        'model.data_preprocessor': dict(views=[[crop], [crop]], equi_ratio=0.5),
        'train_dataloader.dataset.pipeline': [dict(type='PackInputs')],
    }
    found = folders('equi_ratio', [0.25, 0.5], **options)
    assert names(found) == {0.25: 'equi_ratio=0.25', 0.5: 'SER'}
    assert found[0.25].model.data_preprocessor.equi_ratio == 0.25


def test_points_of_the_sweeps():
    layer = folders('layer')
    assert names(layer) == {
        1: 'ser_layer=1,cls_layer=1',
        2: 'SER',  # as in the config
        3: 'ser_layer=3,cls_layer=3',
        4: 'ser_layer=4,cls_layer=4',
        5: 'ser_layer=5,cls_layer=5',
        6: 'ser_layer=6,cls_layer=5',
    }
    assert layer[6].model.algorithm.backbone.ser_layer == 6
    assert layer[6].work_dir == 'work/mocov3/seed7/ser_layer=6,cls_layer=5'
    cls = folders('cls')
    assert names(cls) == {i: 'SER' if i == 2 else f'cls_layer={i}' for i in range(6)}
    assert [c.model.algorithm.backbone.ser_layer for c in cls.values()] == [2] * 6
    assert list(folders('temperature')) == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert names(folders('loss_weight', [0.3]))[0.3] == 'loss_weight=0.3'
    few = folders('equi_ratio', **{'train_dataloader.batch_size': 32})
    assert list(few) == [1 / 16, 1 / 8, 1 / 4, 1 / 2]  # 1 / 32 would have one image in b2
    ratio = folders('equi_ratio', [0.3])[0.3]
    assert ratio.train_dataloader.dataset.pipeline[1].equi_ratio == 0.3


def test_gradient_has_the_arms_of_the_demo():
    options = {
        'model.algorithm.base_momentum': 0.02,
        'model.algorithm.backbone.ser_layer': 3,
        'model.algorithm.backbone.cls_layer': 1,
        'model.head.temperature': 0.3,
        'train_dataloader.batch_size': 64,
    }
    found = folders('gradient', **options)
    assert names(found) == {'baseline': 'baseline', 'views only': 'views_only', 'SER': 'SER'}
    assert found['baseline'].model.type == 'MoCoV3'
    assert found['baseline'].model.base_momentum == 0.02
    assert not {'ser_layer', 'cls_layer'} & found['baseline'].model.backbone.keys()
    assert found['baseline'].model.head.temperature == 0.2  # that of the base loss
    assert [cfg.train_dataloader.batch_size for cfg in found.values()] == [64] * 3
    assert found['views only'].model.loss_weight == 0
    assert found['SER'].model.head.temperature == 0.3
    with pytest.raises(ValueError, match=r'has no baseline byol_vits16\.py'):
        folders('gradient', config='ser_byol_vits16')


def test_addons_have_both_forms_and_their_controls():
    found = folders('addons', **{'train_dataloader.batch_size': 64, 'model.head.temperature': 0.3})
    assert len(set(names(found).values())) == len(found) == 15
    assert [cfg.train_dataloader.batch_size for cfg in found.values()] == [64] * 15
    for title, head in dict(
        AugSelf='AugSelfHead', EquiMod='EquiModHead', STL='STLHead', **{'E-SSL': 'RotationHead'}
    ).items():
        original, moved = found[title].model, found[f'{title} after block 2'].model
        assert original.head == moved.head and original.head.type == head
        assert 'ser_layer' not in original.algorithm.backbone
        assert moved.algorithm.backbone.pop('ser_layer') == 2
        assert moved.algorithm.backbone.pop('cls_layer') == 0
        assert original.to_dict() == moved.to_dict()
        assert original.algorithm == found['baseline'].model
    assert found['STL, weight 0'].model.loss_weight == 0
    assert found['SER'].model.head.temperature == 0.3
    with pytest.raises(ValueError, match=r'has no augself_mocov3_r50\.py'):
        folders('addons', config='ser_mocov3_r50')


def test_addons_are_of_the_same_base_algorithm():
    """Options on it were taken by SER and the baseline alone."""
    options = {
        'model.algorithm.base_momentum': 0.02,
        'model.algorithm.backbone.ser_layer': 3,
        'model.head.temperature': 0.3,
        'train_dataloader.dataset.pipeline.1.equi_ratio': 0.25,
    }
    found = {title: cfg.model for title, cfg in folders('addons', **options).items()}
    algorithms = {title: model.get('algorithm') or model for title, model in found.items()}
    assert {x.base_momentum for x in algorithms.values()} == {0.02}
    for title, model in found.items():
        layer = algorithms[title].backbone.get('ser_layer')
        with_ser = model.type == 'SERAlgorithm'
        assert layer == (3 if with_ser or 'after block 3' in title else None), title
        assert (model.head.get('temperature') == 0.3) == with_ser, title
    several = folders('addons', **options)['SER, 2 + 4 views'].train_dataloader.dataset
    assert several.pipeline[1].equi_ratio == 0.25


def test_stages_of_a_resnet_find_their_channels():
    found = folders('layer', config='ser_barlowtwins_r50')
    assert [cfg.model.algorithm.backbone.ser_layer for cfg in found.values()] == [1, 2, 3, 4]
    assert not any('in_channels' in cfg.model.get('neck', {}) for cfg in found.values())
    with pytest.raises(ValueError, match='layer: the values .* give whole ones'):
        folders('layer', [1.5])
    with pytest.raises(ValueError, match='cls: .*cls_layer is not in'):
        folders('cls', config='ser_barlowtwins_r50')
    with pytest.raises(ValueError, match="choose a config with type='SERAlgorithm'"):
        folders('layer', config='demo/mocov3')


def test_explicit_channels_follow_the_layer_too():
    """Of configs that were written when they had to be given."""
    options = {
        'model.neck.in_channels': 1024,
        'model.data_preprocessor': dict(type='SERDataPreprocessor', patch_size=16),
    }
    found = folders('layer', config='ser_barlowtwins_r50', **options)
    settings = [
        (c.model.neck.in_channels, c.model.data_preprocessor.patch_size) for c in found.values()
    ]
    assert settings == [(256, 4), (512, 8), (1024, 16), (2048, 32)]


def test_costs_of_methods_are_relative_to_the_first():
    found = folders('addons', **{'train_dataloader.batch_size': 8})
    names = 'baseline', 'SER', 'EquiMod'
    cost = costs({name: found[name] for name in names})
    assert [len(cost[name]['views']) for name in names] == [2, 2, 3]
    flops = [cost[name]['gflops'] / cost['baseline']['gflops'] for name in names]
    # Late [CLS] saves what SER costs; a third view is not seen by the momentum branch.
    assert flops[0] == 1 and 0.98 < flops[1] < 1.02 and 1.3 < flops[2] < 1.5
    assert cost['baseline']['time'] == 1 and all(x['seconds'] > 0 for x in cost.values())
    json.dumps(cost)


@pytest.mark.parametrize('file', sorted((ROOT / 'docs/results/ablations').glob('*.json')))
def test_published_sweeps_are_reported_from_their_results(file, tmp_path):
    content = json.loads(file.read_text())
    table = report_sweep(tmp_path, file.stem, content['results'], content['seeds'])
    runs = content['results']['SER' if 'SER' in content['results'] else '2']
    cells = [x.strip() for x in table.splitlines()[-3].split('|')]
    columns = 11 if file.stem == 'addons' else 7
    assert cells[0] == '' and len(cells) == columns + 2
    seeds = content['seeds']
    assert f'Seeds {seeds}' in table
    mean = f'{statistics.mean(run["probe"] for run in runs):.3f}'
    assert (f'{mean} ± ' if len(seeds) > 1 else f' {mean} |') in table
    assert (tmp_path / f'{file.stem}_blocks.png').stat().st_size > 10000


def test_schedules_follow_the_epochs():
    found = folders('gradient', **{'train_cfg.max_epochs': 4})
    assert [cfg.param_scheduler[-1].end for cfg in found.values()] == [4] * 3


def test_data_to_evaluate_on_is_looked_at_before_training(tmp_path):
    options = ('--work-dir', tmp_path / 'work', '--cfg-options', 'evaluation.val=None')
    assert 'evaluation.val is not in' in run_command('ablate', 'layer', *options)
    assert not (tmp_path / 'work').exists()


def tiny(tmp_path, **more):
    """Arguments of a sweep of two short runs."""
    data = dict(data_root=tmp_path / 'photos', train_per_picture=4, val_per_picture=4)
    options = {
        f'{place}.{key}': value
        for place in ('train_dataloader.dataset', 'evaluation.train', 'evaluation.val')
        for key, value in data.items()
    }
    options |= {
        'train_dataloader.batch_size': 18,
        'model.algorithm.backbone.arch.num_layers': 2,
        'model.algorithm.backbone.cls_layer': 1,
        'train_cfg.max_epochs': 4,
        **more,
    }
    args = ['layer', '--seeds', '3', '--jobs', '2', '--work-dir', tmp_path, '--images', '18']
    return [*args, '--cfg-options', *(f'{key}={value}' for key, value in options.items())]


def descendants(pid):
    """All processes below one, by Linux's /proc."""
    children = {}
    for file in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended
            state, parent = file.read_text().rpartition(')')[2].split()[:2]
            children.setdefault(int(parent), []).append(int(file.parent.name))
    found = []
    for child in children.get(pid, []):
        found += [child, *descendants(child)]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs /proc')
@pytest.mark.parametrize('gpus', [None, 2])
def test_a_killed_sweep_leaves_no_process_and_no_second_one_starts_beside_it(
    gpus, tmp_path, request
):
    args = tiny(tmp_path, **{'train_dataloader.num_workers': 1, 'train_cfg.max_epochs': 400})
    if gpus:
        args[1:1] = ['--gpus', gpus]
    command = [sys.executable, '-m', 'ser_mm.cli.ablate', *map(str, args)]
    logs = [tmp_path / 'mocov3' / 'seed3' / f'{name}.log' for name in ('ser_layer=1', 'SER')]
    # Each of two runs finds a port, also where another run has the first of torchrun.
    other = socket.socket()
    request.addfinalizer(other.close)
    with suppress(OSError):  # one has it already
        other.bind(('', 29500))
    env = {name: value for name, value in os.environ.items() if name != 'PORT'}

    def start(until):
        sweep = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=env)
        request.addfinalizer(sweep.kill)
        while sweep.poll() is None and not all(
            log.exists() and until in log.read_text() for log in logs
        ):
            time.sleep(0.05)
        assert sweep.poll() is None, sweep.stderr.read()
        return sweep, descendants(sweep.pid)

    def wait_for_the_end_of(pids):
        deadline = time.monotonic() + 60  # those that read images look every 5 seconds
        while left := [pid for pid in pids if is_running(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    first, below = start(until='Epoch(train)')
    # Two runs, or two launchers of two; each process has another one that reads images
    assert len(below) >= (2 * (1 + 2 * gpus) if gpus else 4)
    told = run_command('ablate', *args)
    assert f'in use by process {first.pid} on' in told and f'`kill {first.pid}`' in told
    assert first.poll() is None and not [x for x in below if not Path(f'/proc/{x}').exists()]

    first.kill()
    first.communicate()
    wait_for_the_end_of(below)

    for log in logs:
        log.unlink()
    second, below = start(until='')
    second.terminate()
    assert 'the same command continues' in second.communicate(timeout=600)[1]
    wait_for_the_end_of(below)
    assert not list(tmp_path.glob('mocov3/seed3/*.lock'))


def is_running(pid):
    with suppress(OSError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


@pytest.mark.slow
def test_a_sweep_goes_on_after_an_interruption(tmp_path, capsys):
    args = tiny(tmp_path, **{'train_cfg.max_epochs': 10})
    command = [sys.executable, '-m', 'ser_mm.cli.ablate', *args]
    out = tmp_path / 'mocov3'
    runs = [out / 'seed3' / name for name in ('ser_layer=1', 'SER')]

    one_thread = {'OMP_NUM_THREADS': '1', **os.environ}  # as figures are taken here, below
    first = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=one_thread)
    while first.poll() is None and not (runs[0] / 'last_checkpoint').exists():
        time.sleep(0.01)  # epochs take longer on any machine
    first.terminate()  # as a scheduler does; Ctrl-C takes the same way
    _, error = first.communicate(timeout=600)
    assert first.returncode and 'the same command continues' in error
    assert not (out / 'layer.json').exists()

    subprocess.run(command, cwd=ROOT, check=True, env=one_thread)
    logs = [Path(f'{run}.log').read_text() for run in runs]
    assert 'Epoch(train) [1]' not in logs[0] and 'Epoch(train) [10]' in logs[0]
    results = json.loads((out / 'layer.json').read_text())['results']
    assert list(results) == ['1', '2']
    for layer, (run,) in results.items():
        mixture = run['layers']['mixture']
        assert run['r2'] == mixture[int(layer) - 1]['r2'] and run['r2_last'] == mixture[-1]['r2']
        assert 0 <= run['knn'] <= 1 and 0 <= run['probe'] <= 1
    assert (out / 'layer.md').read_text().count('\n| ') == 3
    assert (out / 'layer.png').exists() and (out / 'layer_blocks.png').exists()

    times = [(run / 'epoch_10.pth').stat().st_mtime_ns for run in runs]
    assert run_command('ablate', *args) is None
    assert '2 runs, 0 to train' in capsys.readouterr().out
    assert times == [(run / 'epoch_10.pth').stat().st_mtime_ns for run in runs]
    assert not list(out.glob('**/*.features'))

    # Figures belong to the content of a checkpoint, not to its name.
    shutil.copy(runs[1] / 'epoch_10.pth', runs[0] / 'epoch_10.pth')
    assert run_command('ablate', *args) is None
    (first,), (second,) = json.loads((out / 'layer.json').read_text())['results'].values()
    assert first['r2_last'] == pytest.approx(second['r2_last'], rel=1e-9)
    assert first['r2_last'] != pytest.approx(results['1'][0]['r2_last'], rel=1e-9)
