"""What SER adds to a step, in counts that no machine changes."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))


@pytest.mark.slow
def test_one_pass_for_b1_and_b2_costs_few_operators():
    from step import Variant

    init_default_scope('mmpretrain')
    MMLogger.get_instance('cost', log_level='ERROR')
    MessageHub.get_current_instance().update_info('max_iters', 10)
    args = Namespace(batch_size=4, equi_ratio=0.5, device='cpu')
    ser, baseline = (ROOT / 'configs' / f'{name}mocov3_vits16.py' for name in ('ser_', ''))
    counts = {
        name: Variant(config, two_passes, args).count()
        for name, config, two_passes in [
            ('baseline', baseline, False),
            ('packed', ser, False),
            ('two passes', ser, True),
        ]
    }
    operators = {name: row['operators'] for name, row in counts.items()}
    assert operators['packed'] <= 1.3 * operators['baseline']
    assert operators['two passes'] > 2 * operators['baseline']
    assert counts['packed']['flops'] == counts['two passes']['flops']
