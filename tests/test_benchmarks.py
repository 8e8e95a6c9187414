"""Each benchmark runs to its end, at sizes that measure nothing."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.support.images import write_images
from tests.support.paths import ROOT
from tests.support.rounding import rounding

pytestmark = pytest.mark.slow


def run(name, *args, check=True):
    command = [sys.executable, ROOT / 'benchmarks' / name, *map(str, args)]
    env = {'OMP_NUM_THREADS': '1', **os.environ}
    return subprocess.run(command, cwd=ROOT, env=env, check=check, text=True, capture_output=True)


def test_loss(tmp_path):
    out = tmp_path / 'loss.json'
    table = run('loss.py', '--tokens', 256, '--repeats', 1, '--channels', 16, '--out', out)
    result = json.loads(out.read_text())
    assert result['about']['device'] and '| 256 |' in table.stdout
    assert out.with_suffix('.png').stat().st_size > 1000
    for row in result['variants'].values():
        # In float32 two logits of at most 2 are off by 15 operations, a sum by those of 256 terms.
        bound = rounding(2 * (2 * 2 * 15 + 256), 1, torch.float32)
        assert row['SERHead']['loss'] == pytest.approx(row['direct']['loss'], abs=bound)


def test_step(tmp_path):
    out = tmp_path / 'step.json'
    sizes = ['--batch-size', 4, '--equi-ratio', 0.5, '--steps', 1, '--warmup', 0]
    table = run('step.py', *sizes, '--out', out).stdout
    rows = json.loads(out.read_text())['variants']
    assert list(rows) == [line.split('|')[1].strip() for line in table.splitlines()[-4:]]
    assert rows['SER, one pass']['operators'] < rows['SER, two passes']['operators']
    assert rows['SER, one pass']['flops'] == rows['SER, two passes']['flops']


def test_memory(tmp_path):
    out = tmp_path / 'memory.json'
    sizes = ['--batch-size', 4, '--equi-ratio', 0.5, '--steps', 10]
    table = run('memory.py', *sizes, '--out', out).stdout
    rows = json.loads(out.read_text())['variants']
    assert list(rows) == ['baseline', 'SER'] and rows['baseline']['ratio'] == 1
    assert f'{rows["SER"]["ratio"]:.3f}x' in table
    assert all(row['peak'] >= max(row['start'], *row['readings']) > 0 for row in rows.values())
    again = run('memory.py', *sizes, '--out', out)  # reads what is there
    assert table.partition('|')[2] == again.stdout.partition('|')[2] and 'step' not in again.stderr


def test_gradients(tmp_path):
    out = tmp_path / 'gradients.json'
    config = ROOT / 'configs' / 'demo' / 'ser_mocov3.py'
    run('gradients.py', config, '--batches', 1, '--out', out)
    assert all(row['gradient'] > 0 for row in json.loads(out.read_text())['variants'].values())


def test_pipeline(tmp_path):
    out = tmp_path / 'pipeline.json'
    write_images(tmp_path, *(f'images/class {i}/{i}.png' for i in range(3)), side=400)
    (tmp_path / 'images' / 'broken.jpg').write_bytes(b'no image')
    sizes = ['--images', 4, '--batch-size', 2, '--rounds', 1, '--gpu-images-per-second', 1e6]
    text = run('pipeline.py', '--data', tmp_path / 'images', *sizes, '--out', out).stdout
    assert '1 files cannot be read' in text and '| collating ' in text
    result = json.loads(out.read_text())
    assert result['about']['images'] == 3 and result['about']['processor']
    rows = result['variants']
    assert rows['decoding and two crops']['of_floor'] == 1
    assert rows["MMPretrain's MoCo v3"]['of_mmpretrain'] == 1
    for row in rows.values():
        assert row['cores'] == math.ceil(1e6 / row['images_per_second'])
    stages = rows['SER']['stages']
    assert {'LoadReadableImage', 'RandomResizedCrop', 'PackInputs'} < stages.keys()
    assert (
        sum(stages.values()) > 0
        and 'ColorJitter' not in rows['SER, photometry on the device']['stages']
    )


def test_pipeline_without_images(tmp_path):
    error = run('pipeline.py', '--data', tmp_path / 'no', check=False).stderr
    assert f'--data: {tmp_path}/no does not exist' in error.splitlines()[-1]


def test_device_views(tmp_path):
    out = tmp_path / 'device_views.json'
    sizes = ['--size', 32, '--batch-size', 4, '--batches', 1, '--rounds', 1, '--equi-ratio', 0.5]
    run('device_views.py', *sizes, '--out', out)
    rows = json.loads(out.read_text())['variants']
    assert len(rows) == 6 and all(row['images_per_second'] > 0 for row in rows.values())


def test_authors_without_their_release(tmp_path):
    error = run('authors.py', tmp_path, check=False).stderr
    assert f'{tmp_path} has no builder/moco.py' in error.splitlines()[-1]


def test_own_images(tmp_path):
    out, folder = tmp_path / 'own_images.json', tmp_path / 'many'
    sizes = ['--images', 2100, '--rounds', 1, '--folder', folder]
    table = run('own_images.py', *sizes, '--out', out).stdout
    rows = json.loads(out.read_text())['variants']
    assert list(rows) == ['os.walk', 'folder', 'list', 'tar'] and '| tar ' in table
    assert {row['images'] for row in rows.values()} == {2100}
    assert all(
        row['again'] > 0 and row['item'] > 0 for name, row in rows.items() if '.' not in name
    )
