import json

import pytest
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS

from ser_mm.cli.equivariance import _short
from tests.support.command import run_command
from tests.support.paths import ROOT


@pytest.mark.slow
def test_networks_of_two_configs(imagenet_tree, tmp_path, capsys):
    configs = []
    for name, side in dict(ser_mocov3=64, mocov3=48).items():
        cfg = Config.fromfile(ROOT / f'configs/demo/{name}.py')
        pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='CenterCrop', crop_size=side),
            dict(type='PackInputs'),
        ]
        data = dict(type='CustomDataset', data_root=str(imagenet_tree), data_prefix='train')
        cfg.evaluation = dict(val=dict(data, pipeline=pipeline))
        model = MODELS.build(cfg.model)
        model.init_weights()
        (tmp_path / name).mkdir()
        torch.save(dict(state_dict=model.state_dict()), tmp_path / name / 'a.pth')
        cfg.dump(tmp_path / f'{name}.py')
        configs += [tmp_path / f'{name}.py', tmp_path / name / 'a.pth']
    out = ['--images', '6', '--transformations', 'rot90', '--out', tmp_path / 'out']
    assert run_command('equivariance', *configs, *out) is None
    result = json.loads((tmp_path / 'out' / 'equivariance.json').read_text())['results']
    untrained = ['untrained, ser_mocov3', 'untrained, mocov3']
    assert sorted(result) == sorted([*untrained, 'ser_mocov3', 'mocov3'])
    assert all(len(scores['rot90']) == 6 for scores in result.values())
    table = (tmp_path / 'out' / 'equivariance.md').read_text()
    for name, tokens in dict(ser_mocov3=64, mocov3=36).items():  # each has its own chance
        (row,) = (line for line in table.splitlines() if f'| rot90, chance, {name} ' in line)
        assert row.count(f'{1 / tokens:.3f}') == 6
    assert (tmp_path / 'out' / 'equivariance.png').stat().st_size > 10000


def test_what_belongs_to_what(capsys):
    assert run_command('equivariance', 'a.pth') == 2
    assert 'a.pth comes first, but is not a config' in capsys.readouterr().err
    assert run_command('equivariance', 'demo/mocov3', 'ser_mocov3_vits16') == 2
    assert 'no checkpoint follows ser_mocov3_vits16' in capsys.readouterr().err


def test_configs_of_one_name_are_told_apart():
    configs = ['a/ser.py', 'b/ser.py', 'mocov3']
    assert [_short(x, configs) for x in configs] == ['a/ser.py', 'b/ser.py', 'mocov3']
    assert _short('a/ser.py', ['a/ser.py', 'mocov3']) == 'ser'
