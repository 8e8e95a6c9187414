"""Configs by name."""

import pytest

from ser_mm.engine.configs import CONFIG_ROOT, find_config, is_config, shipped_configs
from tests.support.paths import ROOT


def test_a_shipped_config_is_found_by_name_and_by_path(monkeypatch, tmp_path):
    assert CONFIG_ROOT == ROOT / 'configs'
    expected = ROOT / 'configs' / 'demo' / 'ser_mocov3.py'
    monkeypatch.chdir(tmp_path)
    for name in (
        'ser_mocov3',
        'ser_mocov3.py',
        'demo/ser_mocov3',
        'configs/demo/ser_mocov3.py',
        expected,
    ):
        assert find_config(name) == expected
    assert not any('_base_' in name for name in shipped_configs())
    own = tmp_path / 'ser_mocov3'
    own.write_text('')
    assert find_config('ser_mocov3').samefile(own)  # a file comes first


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(FileNotFoundError, match=r"'ser_mocov3_vits': .*ser_mocov3_vits16, "):
        find_config('ser_mocov3_vits')
    with pytest.raises(FileNotFoundError, match='neither a file nor the name'):
        find_config('?')


def test_two_of_a_name_ask_for_more(monkeypatch, tmp_path):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'x.py').write_text('')
    monkeypatch.setattr('ser_mm.engine.configs.CONFIG_ROOT', tmp_path)
    with pytest.raises(FileNotFoundError, match='name of 2 shipped configs; choose a/x or b/x'):
        find_config('x')
    assert find_config('b/x') == tmp_path / 'b' / 'x.py'


def test_configs_are_told_from_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_config('mine.py') and is_config('ser_mocov3_vits16') and is_config('demo/mocov3')
    assert not is_config('epoch_1.pth') and not is_config('work_dirs/epoch_1')
    (tmp_path / 'mocov3').write_text('')
    assert not is_config('mocov3')
