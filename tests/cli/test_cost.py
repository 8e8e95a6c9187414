import json

import pytest

from tests.support.command import run_command
from tests.support.paths import ROOT


@pytest.mark.slow
def test_ser_costs_at_most_3_in_1000(tmp_path, capsys):
    assert run_command('cost', 'ser_mocov3_vits16', '--out', tmp_path / 'cost.json') is None
    result = json.loads((tmp_path / 'cost.json').read_text())
    assert result['about']['batch_size'] == 256
    assert result['about']['flops_ratio'] <= 1.003
    rows = result['rows']
    assert rows['config']['b2'] == 2.56
    assert rows['config']['ratio_without_late_cls'] <= 1.003  # the later [CLS] saves some, too
    assert sum(rows['config']['parts'].values()) == pytest.approx(rows['config']['flops'], abs=4)
    assert run_command('cost', ROOT / 'configs/mocov3_vits16.py') == 2
    assert 'name one with --baseline' in capsys.readouterr().err
