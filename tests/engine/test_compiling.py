"""A run with compiled backbones trains, and its checkpoints are those of any other."""

import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from ser_mm.engine import CompileHook
from ser_mm.engine.compiling import compile_backbones
from tests.support import short_run
from tests.support.paths import ROOT


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="backend='inducter' is none that torch knows.*inductor"):
        CompileHook(backend='inducter')
    with pytest.raises(ValueError, match='Linear has no backbone'):
        compile_backbones(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_train_compiled_and_resume_without(tmp_path, imagenet_tree):
    """The command trains compiled blocks; its checkpoint goes on in eager mode."""
    config = short_run.write_config(tmp_path / 'config.py', imagenet_tree, max_epochs=1)
    cfg = Config.fromfile(config)
    cfg.custom_hooks.append(dict(type='CompileHook', backend='aot_eager'))
    compiled = tmp_path / 'compiled.py'
    cfg.dump(compiled)

    def train(*args):
        command = [sys.executable, ROOT / 'tools/train.py', *args, '--work-dir', tmp_path / 'run']
        return subprocess.run(command, check=True, text=True, capture_output=True)

    log = train(compiled)
    assert 'Compiled: algorithm.backbone' in log.stdout + log.stderr
    state = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)['state_dict']
    assert state and not any('_orig_mod' in key for key in state)
    train(config, '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    after = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=False)['state_dict']
    assert list(after) == list(state)
    key = 'backbone.layers.0.attn.qkv.weight'
    assert not torch.equal(after[key], state[key])
