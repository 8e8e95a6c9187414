"""Sweeps of settings: what they train, and that a sweep goes on after an interruption."""

import json
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from mmengine.config import Config

from ser_mm.experiments.runs import finished, train
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
import ablate  # noqa: E402


def arguments(config='demo/ser_mocov3', **cfg_options):
    return Namespace(
        config=ROOT / f'configs/{config}.py', cfg_options=cfg_options, work_dir=Path('work')
    )


def folders(sweep, values=None, **kwargs):
    args = arguments(**kwargs)
    cfg = ablate.load(args)
    found = {}
    for value, point in ablate.points(cfg, sweep, values).items():
        own = ablate.run_config(args, cfg, point, 7)
        assert own.randomness.seed == 7
        found[value] = own
    return found


def names(found):
    return {value: Path(cfg.work_dir).name for value, cfg in found.items()}


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
    ratio = folders('equi_ratio', [0.3])[0.3]
    assert ratio.train_dataloader.dataset.pipeline[1].equi_ratio == 0.3


def test_gradient_has_the_arms_of_the_demo():
    options = {
        'model.algorithm.base_momentum': 0.02,
        'model.head.temperature': 0.3,
        'train_dataloader.batch_size': 64,
    }
    found = folders('gradient', **options)
    assert names(found) == {'baseline': 'baseline', 'views only': 'views_only', 'SER': 'SER'}
    assert found['baseline'].model.type == 'MoCoV3'
    assert found['baseline'].model.base_momentum == 0.02
    assert found['baseline'].model.head.temperature == 0.2  # that of the base loss
    assert [cfg.train_dataloader.batch_size for cfg in found.values()] == [64] * 3
    assert found['views only'].model.loss_weight == 0
    assert found['SER'].model.head.temperature == 0.3
    with pytest.raises(ValueError, match=r'has no baseline byol_vits16\.py'):
        folders('gradient', config='ser_byol_vits16')


def test_stages_of_a_resnet_have_their_channels_and_strides():
    found = folders('layer', config='ser_barlowtwins_r50')
    settings = [
        (c.model.neck.in_channels, c.model.data_preprocessor.get('patch_size', 16))
        for c in found.values()
    ]
    assert settings == [(256, 4), (512, 8), (1024, 16), (2048, 32)]
    with pytest.raises(ValueError, match='cls: .*cls_layer is not in'):
        folders('cls', config='ser_barlowtwins_r50')
    with pytest.raises(ValueError, match="choose a config with type='SERAlgorithm'"):
        folders('layer', config='demo/mocov3')


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    cfg.work_dir = str(tmp_path / 'run')
    other = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    other.model.loss_weight = 0.5
    Path(f'{cfg.work_dir}.py').write_text(other.pretty_text)
    with pytest.raises(SystemExit, match='holds a run with other settings'):
        train({'run': cfg})
    assert not Path(cfg.work_dir).exists()

    # Where it is kept and how it is evaluated is no other setting: a finished run counts.
    other = Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')
    other.merge_from_dict(dict(work_dir='elsewhere', evaluation=dict(val=None)))
    Path(f'{cfg.work_dir}.py').write_text(other.pretty_text)
    Path(cfg.work_dir).mkdir()
    assert finished(cfg) is None
    Path(cfg.work_dir, 'last_checkpoint').write_text('elsewhere/epoch_8.pth')
    assert finished(cfg) == str(tmp_path / 'run' / 'epoch_8.pth')
    train({'run': cfg})


def test_data_to_evaluate_on_is_looked_at_before_training(tmp_path, monkeypatch):
    command = ['ablate', 'layer', '--work-dir', str(tmp_path / 'work')]
    monkeypatch.setattr(sys, 'argv', [*command, '--cfg-options', 'evaluation.val=None'])
    with pytest.raises(ValueError, match=r'evaluation\.val is not in'):
        ablate.main()
    assert not (tmp_path / 'work').exists()


@pytest.mark.slow
def test_a_sweep_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
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
        'param_scheduler.1.end': 4,
    }
    command = [sys.executable, ROOT / 'tools/ablate.py', 'layer', '--seeds', '3', '--jobs', '2']
    command += ['--work-dir', tmp_path, '--images', '18', '--cfg-options']
    command += [f'{key}={value}' for key, value in options.items()]
    out = tmp_path / 'mocov3'
    runs = [out / 'seed3' / name for name in ('ser_layer=1', 'SER')]

    first = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    while first.poll() is None and not (runs[0] / 'last_checkpoint').exists():
        time.sleep(0.05)
    first.terminate()  # as a scheduler does; Ctrl-C takes the same way
    _, error = first.communicate(timeout=100)
    assert first.returncode == 1 and 'the same command goes on' in error
    assert not (out / 'layer.json').exists()

    subprocess.run(command, cwd=ROOT, check=True)
    logs = [Path(f'{run}.log').read_text() for run in runs]
    assert 'Epoch(train) [1]' not in logs[0] and 'Epoch(train) [4]' in logs[0]
    results = json.loads((out / 'layer.json').read_text())['results']
    assert list(results) == ['1', '2']
    for layer, (run,) in results.items():
        mixture = run['layers']['mixture']
        assert run['r2'] == mixture[int(layer) - 1]['r2'] and run['r2_last'] == mixture[-1]['r2']
        assert 0 <= run['knn'] <= 1 and 0 <= run['probe'] <= 1
    assert (out / 'layer.md').read_text().count('\n| ') == 3
    assert (out / 'layer.png').exists() and (out / 'layer_blocks.png').exists()

    times = [(run / 'epoch_4.pth').stat().st_mtime_ns for run in runs]
    monkeypatch.setattr(sys, 'argv', [str(part) for part in command[1:]])
    ablate.main()
    assert '2 runs, 0 to train' in capsys.readouterr().out
    assert times == [(run / 'epoch_4.pth').stat().st_mtime_ns for run in runs]
    assert not list(out.glob('**/*.features'))

    # Figures belong to the content of a checkpoint, not to its name.
    shutil.copy(runs[1] / 'epoch_4.pth', runs[0] / 'epoch_4.pth')
    ablate.main()
    (first,), (second,) = json.loads((out / 'layer.json').read_text())['results'].values()
    assert first['r2_last'] == pytest.approx(second['r2_last'], rel=1e-9)
    assert first['r2_last'] != pytest.approx(results['1'][0]['r2_last'], rel=1e-9)
