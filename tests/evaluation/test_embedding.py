"""Features of a folder in a file: whose they are, in which order, and how the files are read."""

import importlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import safetensors
import timm
import torch
from mmpretrain import FeatureExtractor
from PIL import Image

from ser_mm.evaluation import Embedder, build_backbone, token_maps_of
from ser_mm.evaluation.embedding import check_names, embed_folder, write_features
from ser_mm.evaluation.export import export_backbone
from tests.support.algorithms import PIXELS
from tests.support.exported import PIPELINE
from tests.support.probed import config
from tests.support.rounding import FLOAT32_NETWORK

# In the order of their names, which is not that of a walk: files, then folders.
NAMES = ['a/1.png', 'a/2 b.png', 'é.png', 'train/3.png', 'val/0.png']
NAMES.sort()


@pytest.fixture
def folder(tmp_path):
    """Images as large as the edge that they are resized to, so that nothing is resampled."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        file = tmp_path / 'my images' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(file)
    return tmp_path / 'my images'


@pytest.fixture
def cfg():
    cfg = config('none')
    cfg.evaluation.val.pipeline = PIPELINE
    cfg.test_dataloader = dict(dataset=dict(cfg.evaluation.val))
    return cfg


def read(file):
    """Features and names, as the documentation says that they are read."""
    if file.suffix == '.npy':
        return np.load(file), json.loads(file.with_suffix('.names.json').read_text())
    if file.suffix == '.safetensors':
        with safetensors.safe_open(file, 'numpy') as opened:
            return opened.get_tensor('features'), json.loads(opened.metadata()['names'])
    table = importlib.import_module('pyarrow.parquet').read_table(file)
    return np.stack(table['feature'].to_numpy()), table['name'].to_pylist()


@pytest.mark.parametrize('suffix', ['.npy', '.safetensors', '.parquet'])
def test_features_are_those_of_timm_and_of_mmpretrain(suffix, folder, cfg, checkpoint, tmp_path):
    if suffix == '.parquet':
        pytest.importorskip('pyarrow')
    out = tmp_path / 'new' / f'features{suffix}'
    features, names = embed_folder(cfg, checkpoint, folder, out, tmp_path / 'cache', batch_size=2)
    assert names == NAMES and features.shape == (5, 48) and features.dtype == np.float32
    found, kept = read(out)
    assert kept == NAMES and found.dtype == np.float32 and np.array_equal(found, features)

    files = [str(folder / name) for name in NAMES]
    extract = FeatureExtractor(cfg, pretrained=checkpoint, device='cpu')
    theirs = torch.stack([outputs[-1] for outputs in extract(files)])
    torch.testing.assert_close(torch.from_numpy(found), theirs, **FLOAT32_NETWORK)

    export_backbone(cfg, checkpoint, tmp_path / 'timm')
    network = timm.create_model(f'local-dir:{tmp_path / "timm"}', pretrained=True, num_classes=0)
    data = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**data)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(file)) for file in files])
        theirs = network.eval()(batch)
    torch.testing.assert_close(torch.from_numpy(found), theirs, **FLOAT32_NETWORK)
    apart = torch.cdist(theirs, theirs) + torch.eye(5)
    assert apart.min() > 100 * FLOAT32_NETWORK['atol']  # so that the order shows


def test_a_list_keeps_its_order(folder, cfg, checkpoint, tmp_path):
    lines = ['val/0.png 7', '../my images/a/1.png', 'a/1.png', 'val/0.png']
    (folder / 'list.txt').write_text('\n'.join(lines))
    cache = tmp_path / 'cache'
    whole, names = embed_folder(cfg, checkpoint, folder, tmp_path / 'x.npy', cache)
    features, listed = embed_folder(
        cfg, checkpoint, folder / 'list.txt', tmp_path / 'x.npy', cache, batch_size=1
    )
    assert listed == [lines[0][:-2], *lines[1:]] and read(tmp_path / 'x.npy')[1] == listed
    expected = [whole[names.index(name)] for name in ('val/0.png', 'a/1.png')]
    np.testing.assert_allclose(
        features, np.stack(expected)[[0, 1, 1, 0]], rtol=0, atol=FLOAT32_NETWORK['atol']
    )


@pytest.mark.parametrize('suffix', ['.npy', '.safetensors'])
def test_token_maps_of_a_layer(suffix, folder, cfg, checkpoint, tmp_path):
    out = tmp_path / f'maps{suffix}'
    maps, _ = embed_folder(cfg, checkpoint, folder, out, tmp_path, layer=2)
    assert np.array_equal(read(out)[0], maps)
    images = torch.stack([torch.from_numpy(np.array(Image.open(folder / x))) for x in NAMES])
    pixels = images[:, 4:36, 14:46].permute(0, 3, 1, 2)
    mean, std = (torch.tensor(PIXELS[x]) for x in ('mean', 'std'))
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    backbone = build_backbone(cfg, checkpoint)
    with torch.no_grad(), token_maps_of(backbone) as maps_of:
        expected = maps_of(pixels)[1]
    torch.testing.assert_close(torch.from_numpy(maps), expected, **FLOAT32_NETWORK)
    # Vectors and maps of other layers are other entries of the cache.
    other, _ = embed_folder(cfg, checkpoint, folder, out, tmp_path, layer=3)
    assert other.shape == maps.shape and not np.array_equal(other, maps)
    assert embed_folder(cfg, checkpoint, folder, out, tmp_path)[0].shape == (5, 48)


def test_images_that_come_meanwhile_are_noticed(folder, cfg, checkpoint, tmp_path, monkeypatch):
    forward = Embedder.forward

    def meanwhile(self, images):
        shutil.copy(folder / NAMES[0], folder / 'new.png')
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, 'forward', meanwhile)
        with pytest.raises(ValueError, match='my images: images came or went while'):
            embed_folder(cfg, checkpoint, folder, tmp_path / 'x.npy', tmp_path / 'cache')
    assert not (tmp_path / 'x.npy').exists()
    _, names = embed_folder(cfg, checkpoint, folder, tmp_path / 'x.npy', tmp_path / 'cache')
    assert names == sorted([*NAMES, 'new.png'])


def test_layers_that_are_not_there(cfg):
    with pytest.raises(ValueError, match='layer=5 is not in the network; choose 1 to 4'):
        Embedder(cfg, layer=5)
    with pytest.raises(ValueError, match='layer=2 is a map, without blocks=2'):
        Embedder(cfg, blocks=2, layer=2)
    cfg.model.algorithm.backbone = dict(type='ConvNeXt', arch='atto')
    with pytest.raises(ValueError, match='layer=2: maps are given by ViTs .* this is ConvNeXt'):
        Embedder(cfg, layer=2)
    cfg.model.algorithm.backbone = dict(type='ResNet', depth=18)
    assert Embedder(cfg, layer=3)(torch.zeros(2, 3, 32, 48)).shape == (2, 256, 2, 3)


def test_a_classifier_of_mmpretrain_without_evaluation(folder, cfg, tmp_path):
    """Its transforms are those of its test data; the images need no labels."""
    network = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
    cfg.model = dict(type='ImageClassifier', backbone=network)
    cfg.data_preprocessor = dict(mean=[0, 0, 0], std=[255, 255, 255], to_rgb=True)
    cfg.evaluation = None
    features, _ = embed_folder(cfg, None, folder, tmp_path / 'x.npy', tmp_path)
    assert features.shape == (5, 64)
    cfg.test_dataloader = None
    with pytest.raises(ValueError, match='does not say how images are prepared; set evaluation'):
        embed_folder(cfg, None, folder, tmp_path / 'x.npy', tmp_path)


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    for suffix in ('.npy', '.safetensors'):
        write_features(tmp_path / f'x{suffix}', np.ones((1, 2), np.float32), ['a'])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {'x.npy', 'x.names.json', 'x.safetensors'}

    def fail(*args):
        raise OSError('no space left on device')

    monkeypatch.setattr(os, 'fsync', fail)
    for suffix in ('.npy', '.safetensors'):
        with pytest.raises(OSError, match='no space'):
            write_features(tmp_path / f'x{suffix}', np.zeros((2, 2), np.float32), ['a', 'b'])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_that_cannot_be_written_are_told_first(folder, cfg, tmp_path, monkeypatch):
    def refusal(kind, name, match, **options):
        with pytest.raises(kind, match=match):
            embed_folder(cfg, 'none.pth', folder, tmp_path / name, **options)

    refusal(ValueError, 'x.csv', r'x.csv: features are written as .npy, .safetensors, .parquet')
    refusal(ValueError, 'x.parquet', 'a column has no maps', layer=2)
    (tmp_path / 'x.npy').mkdir()
    refusal(IsADirectoryError, 'x.npy', 'x.npy is a folder')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refusal(ImportError, 'x.parquet', 'needs pyarrow, which is not installed: run `pip install')


def test_a_config_of_images_in_memory_is_refused(folder, cfg, tmp_path):
    """As those of MMPretrain for CIFAR; it was a KeyError."""
    cfg.evaluation.val.pipeline = [dict(type='PackInputs')]
    with pytest.raises(ValueError, match='images that are in memory, by PackInputs; set eval'):
        embed_folder(cfg, None, folder, tmp_path / 'x.npy', cache_dir=tmp_path / 'c')


def test_names_that_a_format_cannot_hold():
    odd = ['a.png', os.fsdecode(b'\xff.png')]
    check_names('x.npy', odd)
    with pytest.raises(ValueError, match=r"the name '\\udcff.png' is not in UTF-8"):
        check_names('x.parquet', odd)
    with pytest.raises(ValueError, match='2 names are more than this format holds'):
        check_names('x.safetensors', ['a' * 50_000_000, 'b' * 50_000_000])


def test_odd_names_are_kept(tmp_path):
    names = ['a\nb.png', os.fsdecode(b'\xff.png'), '"é\\.png']
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    for suffix in ('.npy', '.safetensors'):
        write_features(tmp_path / f'x{suffix}', features, names)
        found, kept = read(tmp_path / f'x{suffix}')
        assert kept == names and np.array_equal(found, features)
