"""ser-mm export."""

import sys

import pytest
import torch
from mmengine.config import Config

from ser_mm.engine.configs import find_config
from ser_mm.evaluation import build_backbone
from tests.support.command import run_command

timm = pytest.importorskip('timm')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)  # that of a test comes after this
    path = tmp_path_factory.mktemp('run') / 'run.pth'
    network = build_backbone(Config.fromfile(find_config('demo/ser_mocov3')))
    weights = {f'algorithm.backbone.{k}': v for k, v in network.state_dict().items()}
    torch.save(dict(state_dict=weights), path)
    return path


def test_what_it_prints_loads_what_it_wrote(checkpoint, tmp_path, capsys):
    assert run_command('export', 'demo/ser_mocov3', checkpoint, tmp_path / 'timm') is None
    told, _, usage = capsys.readouterr().out.partition('\n\n')
    assert told == f'Written to {tmp_path / "timm"}. To load it:'
    lines = [line for line in usage.splitlines() if 'ser_vit' not in line]  # registered here
    names: dict = {}
    exec('\n'.join(lines), names)
    network = build_backbone('demo/ser_mocov3', str(checkpoint))
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(names['network'].eval()(x), network(x)[-1])
    card = (tmp_path / 'timm' / 'README.md').read_text()
    assert 'MoCoV3 with SER' in card and 'after block 2 of 6' in card and str(tmp_path) not in card


def test_the_card_of_a_folder_named_as_a_word_of_the_code(checkpoint, tmp_path, monkeypatch):
    """Its name was replaced wherever it was: `import FOLDER`."""
    monkeypatch.chdir(tmp_path)
    assert run_command('export', 'demo/ser_mocov3', checkpoint, 'timm') is None
    card = (tmp_path / 'timm' / 'README.md').read_text()
    assert '\nimport timm\n' in card and "'local-dir:FOLDER'" in card


MISTAKES = {
    '--to torchvision': 'backbone.type=SERVisionTransformer cannot be exported to torchvision',
    '--to mmpretrain': 'has cls_layer=2, a late [CLS], which mmpretrain has no network for; keep',
    '--cfg-options model.algorithm.backbone.patch_size=4': 'does not fit SERVisionTransformer',
}


@pytest.mark.parametrize('options', MISTAKES)
def test_mistakes_are_one_sentence(options, checkpoint, tmp_path):
    found = run_command('export', 'demo/ser_mocov3', checkpoint, tmp_path / 'x', *options.split())
    assert found.startswith('error: ') and MISTAKES[options] in found
    assert not (tmp_path / 'x').exists()


class Evil:
    def __reduce__(self):
        return (print, ('run',))


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save(dict(state_dict={}, extra=Evil()), tmp_path / 'evil.pth')
    found = run_command('export', 'demo/ser_mocov3', tmp_path / 'evil.pth', tmp_path / 'x')
    assert 'holds more than data' in found and 'run' not in capsys.readouterr().out.split()


def test_without_its_package_it_is_one_sentence(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    found = run_command('export', 'demo/ser_mocov3', checkpoint, tmp_path / 'x')
    assert found.endswith("which is not installed: run `pip install 'ser_mm[timm]'`.")
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    found = run_command('export', 'demo/ser_mocov3', checkpoint, tmp_path / 'x', '--to', 'onnx')
    assert found.endswith("which are not all installed: run `pip install 'ser_mm[onnx]'`.")
    assert not (tmp_path / 'x').exists()
