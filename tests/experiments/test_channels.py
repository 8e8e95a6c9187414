"""Images that three channels of 8 bits do not hold, from their files to the network."""

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from mmengine.config import Config
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image

from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.data import build_preprocessor
from ser_mm.evaluation.export import data_config
from ser_mm.evaluation.robustness import corrupted
from ser_mm.experiments.channels import describe, measure_channels
from ser_mm.experiments.recipes import pretraining_config
from tests.support.images import write_deep_images


@pytest.fixture
def deep(tmp_path):
    """A folder of a dozen TIFFs of odd sizes, of five channels of 16 bits."""
    write_deep_images(tmp_path / 'deep', 12, 5)
    return tmp_path / 'deep'


def config(data, tmp_path, **options):
    options = {'model': 'vit_tiny_patch16', 'image_size': 64, 'batch_size': 4, **options}
    return pretraining_config(data, tmp_path / 'out', **options)


def types(steps):
    """Of transforms, those within others included."""
    for step in steps:
        yield step.type
        yield from types(step.get('transforms', ()))


@pytest.mark.parametrize(
    'model, method',
    [
        ('resnet18', 'byol'),
        ('timm/vit_tiny_patch16_224', 'mocov3'),
    ],
)
def test_a_network_has_the_channels_of_the_images(deep, tmp_path, model, method):
    cfg = config(deep, tmp_path, model=model, method=method)
    built = build_model(cfg)  # which tries a step
    assert built.backbone.image_channels == 5
    assert built.data_preprocessor.mean.tolist() == [[[127.5]]]
    _, views, pack = map(TRANSFORMS.build, cfg.train_dataloader.dataset.pipeline)
    files = sorted(map(str, deep.iterdir()))
    load = TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[0])
    inputs = pack(views(load(dict(img_path=files[0]))))['inputs']
    assert [x.shape for x in inputs[:2]] == [(5, 64, 64)] * 2
    assert {x.dtype for x in inputs[:2]} == {torch.float32}
    kinds = {
        kind for view in cfg.train_dataloader.dataset.pipeline[1].transforms for kind in types(view)
    }
    assert 'FastColorJitter' in kinds and 'FastRandomGrayscale' not in kinds


@pytest.mark.parametrize(
    'channels, dtype', [(5, 'uint16'), (3, 'uint16'), (1, 'uint8'), (2, 'float32')]
)
def test_the_network_sees_values_of_mean_0_and_deviation_1(channels, dtype, tmp_path):
    """In an evaluation, in training, and by what an export says."""
    data = tmp_path / 'data'
    images = write_deep_images(data, 12, channels, dtype)
    cfg = config(data, tmp_path, channels=channels)
    load = TRANSFORMS.build(cfg.evaluation.val.pipeline[0])
    unit = 255 if dtype == 'uint8' else 1
    mean, std = np.array(load.mean), np.array(load.std)
    values = [x.reshape(-1, channels) / unit for x in images]
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in values], 0), rtol=1e-6)
    algorithm = cfg.model.algorithm
    said = data_config(cfg, MODELS.build(algorithm.backbone))
    assert said['input_size'] == [channels, 64, 64]
    np.testing.assert_allclose([said['mean'], said['std']], [mean, std], rtol=1e-6)
    image = load(dict(img_path=str(data / '0.tif')))['img']
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = ((images[0] / unit - mean) / std).transpose(2, 0, 1)[None]
    in_training = MODELS.build(dict(algorithm.data_preprocessor, type='SERDataPreprocessor'))
    for preprocessor in (build_preprocessor(cfg), in_training):
        seen = preprocessor(dict(inputs=batch.clone(), data_samples=None))['inputs'].cpu()
        # float32 of values up to 255 of deviation 64
        np.testing.assert_allclose(seen, expected, rtol=0, atol=255 * 2**-23 * 4)


def test_most_images_decide(tmp_path):
    """Those of 8 bits are read as ever."""
    write_deep_images(tmp_path, 3, 1)
    deep = sorted(map(str, tmp_path.iterdir()))
    plain = []
    for number in range(4):
        plain.append(str(tmp_path / f'{number}.png'))
        Image.fromarray(skimage.data.astronaut()[::8, ::8]).save(plain[-1])
    assert measure_channels(plain) is None and measure_channels(plain + deep) is None
    # No JPEG is opened for that.
    assert measure_channels(['no such.jpg'] * 10 + deep) is None
    load = measure_channels(deep)
    assert (load['channels'], load['dtype']) == (3, 'uint16') and len(set(load['mean'])) == 1
    assert describe(load).startswith('images of 3 channels of uint16, mean ')
    assert measure_channels(deep, 1)['mean'] == load['mean'][:1]
    assert 'images of 1 channel of uint16' in describe(measure_channels(deep, 1))
    assert 'left out' in describe(measure_channels(deep, 1)) and 'left' not in describe(load)
    with pytest.raises(ValueError, match='0.png has values of uint8, and others uint16; write all'):
        measure_channels(deep + plain[:2])


@pytest.mark.parametrize(
    'channels, asked, told',
    [
        (5, 3, r'0.tif has 5 channels, and 3 are taken; give images of one kind, or ask for anoth'),
        (3, 1, r'0.tif has 3 channels, and 1 are taken'),
    ],
)
def test_other_channels_than_asked_for_are_refused_before_the_run(channels, asked, told, tmp_path):
    write_deep_images(tmp_path / 'data', 8, channels)
    with pytest.raises(ValueError, match=told):
        config(tmp_path / 'data', tmp_path, channels=asked)


def test_images_that_nobody_can_read_are_refused_before_the_run(tmp_path):
    tifffile.imwrite(tmp_path / 'x.tif', np.ones((8, 9, 5), np.uint16) * 1j)
    with pytest.raises(ValueError, match='x.tif (is no|has).*; write'):
        measure_channels([str(tmp_path / 'x.tif')])


def test_one_image_with_nan_is_passed_over(tmp_path):
    """As in training; where all have some, the run is refused."""
    write_deep_images(tmp_path, 6, 2, 'float32')
    files = sorted(map(str, tmp_path.iterdir()))
    image = tifffile.imread(files[3])
    tifffile.imwrite(files[3], image * np.nan, photometric='minisblack', planarconfig='contig')
    assert measure_channels(files) == measure_channels(files[:3] + files[4:])
    with pytest.raises(ValueError, match='3.tif has values that are infinite or no number; repl'):
        measure_channels(files[3:4])


def test_a_mean_of_many_deviations_and_a_channel_that_is_one_number(tmp_path):
    """Of int32, beyond the digits of float32; 0.1 has a deviation by rounding."""
    rng = np.random.default_rng(0)
    files = [str(tmp_path / f'{i}.tif') for i in range(4)]
    for file in files:
        values = 2_000_000_123 + rng.integers(0, 40, (48, 51))
        tifffile.imwrite(file, values.astype(np.int32))
    load = TRANSFORMS.build(measure_channels(files, 1))
    seen = np.array([load(dict(img_path=file))['img'] for file in files])
    assert abs(seen.mean(dtype=float) - 127.5) < 0.01
    for file in files:
        tifffile.imwrite(file, np.full((48, 51), 0.1))
    load = TRANSFORMS.build(measure_channels(files, 1))
    assert np.ptp(load(dict(img_path=files[0]))['img'] - 127.5) == 0
    assert abs(load(dict(img_path=files[0]))['img'] - 127.5).max() < 0.01


def test_a_run_goes_on_with_the_mean_of_its_start(deep, tmp_path):
    first = config(deep, tmp_path)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'run.py').write_text(first.pretty_text)
    (deep / '3.tif').unlink()
    again = config(deep, tmp_path)
    assert again.train_dataloader.dataset.pipeline == first.train_dataloader.dataset.pipeline
    assert Config.fromfile(tmp_path / 'out' / 'run.py').model == first.model


def test_weights_of_colours_do_not_fit_other_channels(deep, images, tmp_path):
    weights = MODELS.build(config(images, tmp_path).model.algorithm.backbone).state_dict()
    torch.save(weights, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='leave them out, if they are of .* than of 5 channels'):
        config(deep, tmp_path, weights=tmp_path / 'weights.pth')
    # Grey images are three equal channels, which they fit.
    write_deep_images(tmp_path / 'grey', 8, 1)
    assert config(tmp_path / 'grey', tmp_path, weights=tmp_path / 'weights.pth')


def test_corruptions_are_refused(deep, tmp_path):
    with pytest.raises(ValueError, match='5 channels of uint16, by LoadChannels, and corruptions'):
        corrupted(config(deep, tmp_path).evaluation.val, 'fog', 1)
