"""Images of other channels and bits, and what transforms make of them."""

import colorsys

import numpy as np
import pytest
import tifffile
from mmpretrain.registry import TRANSFORMS

from ser_mm.datasets import FastColorJitter, LoadChannels
from tests.support.fast_views import PHOTOS, build, crop, jitter, pairs, seed, small

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 65536, (30, 40, 5)).astype(np.uint16)
LOAD = dict(channels=5, dtype='uint16', mean=[32768.0] * 5, std=[18918.0] * 5)
GREY = dict(type='FastRandomGrayscale', prob=1.0, channel_weights=(0.114, 0.587, 0.2989))
# Levels that uint8 is off: a fraction that is cut off, or half a level in the end; in between, half
# a level of grey times a factor of 0.4 or less.
STEPS = {
    'brightness': (jitter(brightness=0.4), 1),
    'contrast': (jitter(contrast=0.4), 1.2),
    'saturation': (jitter(saturation=0.4), 1.2),
    'grey': (GREY, 1),
    'solarize': (dict(type='FastSolarize', thr=128, prob=0.7), 0),
    'blur': (dict(type='FastGaussianBlur', radius=1.5, prob=1.0), 0.51),
    'crop': (crop(), 1.5),
    'flip': (dict(type='FastRandomFlip', prob=1.0), 0),
}
COLOURLESS = [x for x in STEPS if x not in ('saturation', 'grey')]


def write(path, image=VALUES):
    tifffile.imwrite(path, image, photometric='minisblack', planarconfig='contig')
    return dict(img_path=str(path))


def test_mean_and_deviation_are_where_photometry_and_preprocessors_look(tmp_path):
    results = write(tmp_path / 'x.tif')
    load = dict(LOAD, mean=VALUES.mean((0, 1)).tolist(), std=VALUES.std((0, 1)).tolist())
    image = LoadChannels(**load)(results)['img']
    assert image.dtype == np.float32 and image.shape == VALUES.shape
    np.testing.assert_allclose(image.mean((0, 1), float), 127.5, atol=1e-3)
    np.testing.assert_allclose(image.std((0, 1), dtype=float), 64, atol=1e-3)
    # 16 bits stay: neighbouring values are neighbours, and none are one.
    steps = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1)
    steps = LoadChannels(1, 'uint16', [32768.0], [18918.0]).scale(steps)
    assert (np.diff(steps.ravel()) > 0).all()


def test_colours_are_in_the_order_of_the_other_loaders(tmp_path):
    """BGR; mean and std are in that of the file."""
    results = write(tmp_path / 'x.tif', VALUES[..., :3])
    load = LoadChannels(3, 'uint16', [0.0, 1.0, 2.0], [64.0] * 3)
    expected = VALUES[..., :3] - np.array([0.0, 1.0, 2.0]) + 127.5
    np.testing.assert_array_equal(load(results)['img'], expected[..., ::-1].astype(np.float32))


@pytest.mark.parametrize(
    'image, told',
    [
        (VALUES[..., :4], 'has 4 channels, and 5 are taken'),
        (VALUES.astype(np.uint8), 'has values of uint8, and others uint16'),
        (b'II*\0', 'is no TIFF that can be read'),
        (None, 'No such file'),
    ],
)
def test_another_image_is_skipped_with_its_name(image, told, tmp_path, monkeypatch):
    sentences = []
    monkeypatch.setattr(
        'ser_mm.datasets.transforms.load_channels.print_log', lambda x, *_: sentences.append(x)
    )
    path = tmp_path / 'x.tif'
    if isinstance(image, bytes):
        path.write_bytes(image)
    elif image is not None:
        write(path, image)
    assert LoadChannels(**LOAD)(dict(img_path=str(path))) is None
    assert len(sentences) == 1 and f'{path} ' in sentences[0] and told in sentences[0]
    with pytest.raises((OSError, ValueError), match=told):
        LoadChannels(**LOAD, skip=False)(dict(img_path=str(path)))


def test_numbers_for_each_channel_are_needed():
    with pytest.raises(ValueError, match='give one number of each for channels=4'):
        LoadChannels(**(LOAD | dict(channels=4)))


@pytest.mark.parametrize('name', STEPS)
def test_floats_are_treated_as_8_bits_are(name):
    config, levels = STEPS[name]
    transform = build(config)
    for number, image in enumerate(small()):
        # in the middle, so that nothing is cut off
        image = (64 + image // 2).clip(65, 180).astype(np.uint8)
        found = []
        for given in (image, image.astype(np.float32)):
            seed(number)
            found.append(transform(dict(img=given, img_shape=given.shape[:2]))['img'])
        assert found[1].dtype == np.float32
        assert np.abs(found[0].astype(float) - found[1].clip(0, 255)).max() <= levels


@pytest.mark.parametrize('name', ['brightness', 'contrast'])
def test_nothing_is_cut_off(name):
    image = np.random.default_rng(0).normal(127.5, 200, (20, 30, 5)).astype(np.float32)
    grey = 0 if name == 'brightness' else image.mean(dtype=float)
    for factor in (0.5, 1.4):
        found = FastColorJitter(**{name: (factor, factor)})(dict(img=image))['img']
        np.testing.assert_allclose(found, grey + factor * (image - grey), rtol=0, atol=1e-3)


@pytest.mark.parametrize('turns', [-0.5, 0.001, 0.1])
def test_hues_of_floats_are_exact(turns):
    colours = np.random.default_rng(0).normal(127.5, 64, (25, 40, 3)).astype(np.float32)
    ours = FastColorJitter(hue=(turns, turns))(dict(img=colours))['img']
    low = colours.min()
    for colour, found in zip(colours.reshape(-1, 3), ours.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(colour[::-1] - low).astype(float))
        exact = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
        # float32 knows degrees to 3e-5, in which a colour of 500 changes by 500 / 60
        assert np.abs(np.array(exact)[::-1] + low - found).max() < 5e-3


@pytest.mark.parametrize('channels', [1, 2, 5, 13])
@pytest.mark.parametrize('name', COLOURLESS)
def test_every_channel_is_treated_alike(name, channels):
    transform = build(STEPS[name][0])
    one = np.random.default_rng(0).normal(127.5, 64, (96, 104, 1)).astype(np.float32)
    found = []
    for count in (1, channels):
        seed(0)
        results = dict(img=one.repeat(count, 2), img_shape=one.shape[:2])
        found.append(transform(results)['img'])
    assert found[1].shape == (*found[0].shape[:2], channels)
    np.testing.assert_allclose(found[1], found[0].repeat(channels, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize('config', [jitter(saturation=0.4), jitter(hue=0.1), GREY])
def test_colours_of_other_channels_are_refused(config):
    image = np.zeros((8, 8, 5), np.float32)
    with pytest.raises(ValueError, match='img has 5 channels, and colours have three; leave it'):
        build(config)(dict(img=image))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('scale, edge', [(73, 'short'), (200, 'long')])
def test_edges_are_resized_as_by_mmpretrain(interpolation, scale, edge):
    """Tolerances as those of crops; values of which nothing is cut off."""
    images = [(64 + x / 2).clip(65, 191).astype(np.uint8) for x in small(120)]
    options = dict(scale=scale, edge=edge, backend='pillow', interpolation=interpolation)
    config = dict(type='FastResizeEdge', **options)
    for _, ours, theirs in pairs(config, dict(config, type='ResizeEdge'), images):
        off = np.abs(ours - theirs)
        assert off.max() <= 2 and off.mean() <= 0.1
    image = PHOTOS[0].astype(np.float32)[..., [0, 1, 2, 0, 1]]
    resized = TRANSFORMS.build(config)(dict(img=image))
    assert resized['img'].dtype == np.float32
    assert resized['img'].shape == (*resized['img_shape'], 5)
