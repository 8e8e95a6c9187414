"""The Python of the how-tos does what it says, in a folder laid out as they say."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from ser_mm.evaluation import build_backbone
from tests.support.command import run_command
from tests.support.paths import ROOT
from tests.support.probed import write_untrained

pytestmark = pytest.mark.slow  # by the size of the network

PAGE = (ROOT / 'docs' / 'howto' / 'use_backbone.md').read_text()
NAME = 'ser_mocov3_vits16'
# Sums of up to 1536 products in float32, four in a row in each of 12 blocks, if all their errors
# were of one sign.
CLOSE = dict(rtol=0, atol=1536 * 4 * 12 * torch.finfo(torch.float32).eps / 2)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """What a run of the config leaves, and images."""
    folder = tmp_path_factory.mktemp('howto')
    run = folder / 'work_dirs' / NAME
    run.mkdir(parents=True)
    write_untrained(NAME, run / 'epoch_100.pth')
    rng = np.random.default_rng(0)
    (folder / 'my images').mkdir()
    for name in ('a.jpg', 'b.jpg', 'my images/a.jpg', 'my images/b.jpg'):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((280, 260)).save(folder / name)
    for name in ('a.jpg', 'b.jpg'):
        (folder / 'my images' / name).write_bytes((folder / name).read_bytes())
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def python(text):
    """Run the block of the page that holds a text; returns the names that it makes."""
    (block,) = [x for x in re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL) if text in x]
    names: dict = {}
    exec(block, names)
    return names


def command(text):
    """Run the line of the page that holds a text."""
    (line,) = [x for x in PAGE.splitlines() if x.startswith('ser-mm ') and text in x]
    assert run_command(*shlex.split(line, comments=True)[1:]) is None


def test_features_by_embedder_by_mmpretrain_and_by_command(here):
    expected = python('embedder.embed(')['features']
    assert expected.shape == (2, 384) and (expected[0] - expected[1]).abs().max() > 0.1
    theirs = torch.stack(python('FeatureExtractor(')['features'])
    torch.testing.assert_close(theirs.cpu(), expected, **CLOSE)
    command(f'embed {NAME}')
    found = python('features.names.json')
    assert found['names'] == ['a.jpg', 'b.jpg']
    torch.testing.assert_close(torch.from_numpy(found['features']), expected, **CLOSE)


def test_features_by_onnx(here):
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    command('--to onnx')
    found = python('onnxruntime.InferenceSession(')
    network = build_backbone(NAME, f'work_dirs/{NAME}/epoch_100.pth').cpu()
    with torch.no_grad():
        expected = network(torch.from_numpy(found['image'])[None])[-1]
    assert found['data']['input_size'] == [3, 224, 224]
    timm = pytest.importorskip('timm')
    prepare = timm.data.create_transform(**found['data'])
    prepared = prepare(Image.open('a.jpg').convert('RGB'))
    torch.testing.assert_close(torch.from_numpy(found['image']), prepared, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found['features']), expected, **CLOSE)
