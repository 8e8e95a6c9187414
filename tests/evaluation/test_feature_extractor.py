"""MMPretrain's own interfaces take our configs, names and checkpoints."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain import FeatureExtractor, get_model, list_models
from PIL import Image

import ser_mm  # noqa: F401  registers the modules and the model index
from ser_mm.evaluation import Embedder
from tests.support.paths import ROOT
from tests.support.probed import write_untrained
from tests.support.rounding import FLOAT32_NETWORK


@pytest.fixture(scope='module')
def demo():
    return Config.fromfile(ROOT / 'configs/demo/ser_mocov3.py')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Weights as a run writes them."""
    return write_untrained('demo/ser_mocov3', tmp_path_factory.mktemp('run') / 'epoch_1.pth')


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(60, 80, 3), dtype=np.uint8) for _ in range(3)]


def test_features_are_those_of_our_embedder(demo, checkpoint, images):
    """The first image alone and in a batch, by MMPretrain and by us."""
    extract = FeatureExtractor(demo, pretrained=checkpoint, device='cpu')
    found = torch.stack([outputs[-1] for outputs in extract(images, batch_size=2)])
    embedder = Embedder(demo, checkpoint)
    expected = embedder.embed(images)
    assert expected.shape == (3, 96) and not expected.requires_grad
    # Other batches, so other sums
    torch.testing.assert_close(found, expected.to(found.device), **FLOAT32_NETWORK)


def test_embed_takes_files_and_arrays(demo, checkpoint, images, tmp_path):
    from PIL import Image

    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f'{i}.png')
        Image.fromarray(image[..., ::-1]).save(files[-1])  # arrays are BGR, as pipelines load them
    embedder = Embedder(demo, checkpoint)
    expected = embedder.embed(images)
    assert torch.equal(embedder.embed(files), expected)
    assert embedder.embed(str(files[0])).shape == (1, 96)
    torch.testing.assert_close(embedder.embed(files, batch_size=1), expected, **FLOAT32_NETWORK)
    with pytest.raises(FileNotFoundError, match='absent.png'):
        embedder.embed([tmp_path / 'absent.png'])
    with pytest.raises(ValueError, match='no image'):
        embedder.embed([])


def test_an_array_alone_and_images_that_no_transform_loads(demo, checkpoint, images):
    """Rows of an array were taken for images, and the first transform was left out."""
    embedder = Embedder(demo, checkpoint)
    assert torch.equal(embedder.embed(images[0]), embedder.embed(images[:1]))
    held = copy.deepcopy(demo)
    held.evaluation.val.pipeline.pop(0)
    assert torch.equal(Embedder(held, checkpoint).embed(images[:1]), embedder.embed(images[:1]))
    with pytest.raises(ValueError, match='x.png is a file, .* loads none; give arrays'):
        Embedder(held, checkpoint).embed('x.png')
    opened = Image.fromarray(np.zeros((48, 48, 3), np.uint8))
    for odd, message in (
        (opened, 'an image is a Image; give its file'),
        ([opened], 'an image is a Image; give its file'),
        (np.zeros((48, 48, 3), np.float32), 'values of float32; give'),
        (np.zeros((48, 48, 4), np.uint8), r'shape \(48, 48, 4\)'),
        (np.zeros((48, 48), np.uint8), r'shape \(48, 48\)'),
    ):
        with pytest.raises(ValueError, match=message):
            embedder.embed(odd)


def test_names_of_shipped_configs(checkpoint, images):
    names = list_models('*ser_*')
    assert {'ser_mocov3_vits16', 'ser_dino_vits16', 'ser_barlowtwins_r50'} <= set(names)
    model = get_model('ser_mocov3_vits16', device='cpu')
    assert type(model).__name__ == 'SERAlgorithm' and model.data_preprocessor.mean is not None
    by_name = Embedder('demo/ser_mocov3', checkpoint).embed(images)
    by_path = Embedder(ROOT / 'configs/demo/ser_mocov3.py', checkpoint).embed(images)
    assert torch.equal(by_name, by_path)


@pytest.mark.parametrize('name', ['ser_dino_vits16', 'ser_barlowtwins_vits16', 'ser_mocov3_r50'])
def test_extract_feat_of_every_algorithm(name, images):
    extract = FeatureExtractor(str(ROOT / f'configs/{name}.py'), pretrained=None, device='cpu')
    (outputs,) = extract(images[:1])
    assert outputs[-1].isfinite().all()
