"""ser-mm embed."""

import json

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile

from ser_mm.evaluation import Embedder
from tests.support.command import run_command
from tests.support.images import write_deep_images, write_images
from tests.support.probed import write_untrained
from tests.support.rounding import FLOAT32_NETWORK

CONFIG = 'demo/ser_mocov3'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return write_untrained(CONFIG, tmp_path_factory.mktemp('network') / 'epoch_1.pth')


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'my images', *(f'{i}.png' for i in range(6)))
    return tmp_path / 'my images'


def test_a_folder_by_command(images, checkpoint, capsys):
    args = ['--data', 'my images', '--out', 'found/features.npy', '--batch-size', 4]
    assert run_command('embed', CONFIG, checkpoint, *args) is None
    assert 'found/features.npy: 6 images, 96 each' in capsys.readouterr().out
    names = json.loads((images.parent / 'found/features.names.json').read_text())
    assert names == [f'{i}.png' for i in range(6)]
    features = torch.from_numpy(np.load('found/features.npy'))
    expected = Embedder(CONFIG, str(checkpoint)).embed([images / name for name in names])
    torch.testing.assert_close(features, expected, **FLOAT32_NETWORK)
    more = ['--data', images, '--out', 'maps.safetensors', '--layer', 2, '--cache-dir', 'c']
    assert run_command('embed', CONFIG, checkpoint, *more) is None
    assert 'maps.safetensors: 6 images, 96 x 6 x 6 each' in capsys.readouterr().out


def test_what_a_config_of_8_bits_loses_is_told(checkpoint, tmp_path, monkeypatch):
    """Pretraining said so; evaluations read the same files without a word."""
    monkeypatch.chdir(tmp_path)
    folder, told = tmp_path / 'deep', []
    monkeypatch.setattr(
        'ser_mm.datasets.transforms.load_readable_image.print_log', lambda x, **_: told.append(x)
    )
    write_deep_images(folder, 3, channels=1)
    assert run_command('embed', CONFIG, checkpoint, '--data', folder, '--out', 'x.npy') is None
    (sentence,) = told
    assert 'has 16 bits a channel' in sentence and 'LoadChannels' in sentence


def test_an_interruption_is_told_and_the_rest_is_extracted(images, checkpoint, capsys, monkeypatch):
    reads, load, forward = [], LoadImageFromFile.transform, Embedder.forward

    def counted(self, results):
        reads.append(results['img_path'])
        return load(self, results)

    def interrupted(self, batch):
        if len(reads) > 4:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(LoadImageFromFile, 'transform', counted)
    args = [CONFIG, checkpoint, '--data', images, '--batch-size', 2, '--out']
    assert run_command('embed', *args, 'whole.npy', '--cache-dir', 'other') is None
    reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, 'forward', interrupted)
        assert run_command('embed', *args, 'x.npy') == 130
    assert capsys.readouterr().err.endswith('and the same command extracts the rest.\n')
    assert not list(images.parent.glob('*x.*'))
    reads.clear()
    assert run_command('embed', *args, 'x.npy') is None
    assert len(reads) == 2
    assert np.array_equal(np.load('x.npy'), np.load('whole.npy'))  # the same batches


MISTAKES = {
    '--data none --out x.npy': '--data none does not exist; give a folder of images',
    '--data images --out x.txt': '--out x.txt: features are written as .npy, .safetensors',
    '--data images --out images/0.png/x.npy': '--out images/0.png/x.npy: ',
    '--data images --out x.npy --layer 7': 'layer=7 is not in the network; choose 1 to 6',
    '--data images --out x.npy --blocks 9': 'blocks=9: [CLS] is in the last 4 blocks',
    '--data bad --out x.npy': 'evaluation.images: 1 of 1 images cannot be read: ',
}


@pytest.mark.parametrize('line', MISTAKES)
def test_mistakes_are_one_sentence(line, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, 'images/0.png')
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'broken.jpg').write_bytes(b'text')
    found = run_command('embed', CONFIG, checkpoint, *line.split())
    assert found.startswith('error: ') and MISTAKES[line] in found and '\n' not in found
    assert not list(tmp_path.glob('x.*'))
