"""Image files with all of their channels and bits."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from ser_mm.datasets.pixels import fit_channels, measure, read_pixels

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (8, 9, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (8, 9, 13)).astype(np.uint16)
GREY, TRIPLE = DEEP[..., :1] % 4096, DEEP[..., :3]
FLOAT = RNG.normal(size=(8, 9, 2)).astype(np.float32)
SIGNED = RNG.integers(-(2**31), 2**31, (8, 9, 1)).astype(np.int32)
WITH_ALPHA = np.dstack([TRIPLE, DEEP[..., 3]])


def tiff(image, path, **options):
    options = dict(photometric='minisblack', planarconfig='contig') | options
    if image.shape[2] == 1:
        image, options = image[..., 0], dict(photometric='minisblack') | options
        options.pop('planarconfig')
    tifffile.imwrite(path, image, **options)


def planes(image, path, **options):
    tiff(np.moveaxis(image, 2, 0), path, planarconfig='separate', **options)


def opencv(image, path):
    order = [2, 1, 0, 3][: image.shape[2]] if image.shape[2] > 2 else [0]
    assert cv2.imwrite(str(path), image[..., order])


def pillow(image, path, **options):
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(path, **options)


WAYS = {
    'grey, 12 of 16 bits, PNG': ('x.png', GREY, opencv),
    'grey, 12 of 16 bits, TIFF': ('x.tif', GREY, tiff),
    'grey, 16 bits, PGM': ('x.pgm', GREY, opencv),
    'colours, 16 bits, PNG': ('x.png', TRIPLE, opencv),
    'colours, 16 bits, TIFF': ('x.tif', TRIPLE, lambda *x: tiff(*x, photometric='rgb')),
    'big endian': ('x.tif', DEEP, lambda *x: tiff(*x, byteorder='>')),
    'many channels': ('x.tif', DEEP, tiff),
    'many channels, one after another': ('x.tif', DEEP, planes),
    'four channels, none transparency': ('x.tif', DEEP[..., :4], tiff),
    'two channels': ('x.tif', DEEP[..., :2], planes),
    'OME': (
        'x.tif',
        DEEP,
        lambda image, path: tifffile.imwrite(
            path, np.moveaxis(image, 2, 0), ome=True, metadata=dict(axes='CYX')
        ),
    ),
    'floats': ('x.tif', FLOAT, tiff),
    'signed': ('x.tif', SIGNED, tiff),
    'deflate': ('x.tif', DEEP, lambda *x: tiff(*x, compression='zlib')),
    'LZW': ('x.tif', GREY, lambda *x: pillow(*x, compression='tiff_lzw')),
    'WebP': ('x.webp', COLOUR, lambda *x: pillow(*x, lossless=True)),
    'colours, TIFF': ('x.tif', COLOUR, pillow),
}


@pytest.mark.parametrize('way', WAYS)
def test_every_bit_of_every_channel_is_read(way, tmp_path):
    name, image, save = WAYS[way]
    save(image, tmp_path / name)
    found = read_pixels((tmp_path / name).read_bytes())
    np.testing.assert_array_equal(found, image, strict=True)


@pytest.mark.parametrize('kind', ['tif', 'png'])
def test_transparency_is_a_channel_if_that_many_are_asked_for(kind, tmp_path):
    path = tmp_path / f'x.{kind}'
    if kind == 'tif':
        tiff(WITH_ALPHA, path, photometric='rgb', extrasamples=['unassalpha'])
    else:
        opencv(WITH_ALPHA, path)
    content = path.read_bytes()
    np.testing.assert_array_equal(read_pixels(content), TRIPLE)
    np.testing.assert_array_equal(read_pixels(content, 3), TRIPLE)
    np.testing.assert_array_equal(read_pixels(content, 4), WITH_ALPHA)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_every_orientation_of_any_channels_is_that_of_pillow(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(COLOUR).save(tmp_path / 'x.tif', exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'x.tif')))
    np.testing.assert_array_equal(read_pixels((tmp_path / 'x.tif').read_bytes()), upright)
    image = np.concatenate([COLOUR, COLOUR[..., :2]], 2).astype(np.uint16)
    tiff(image, tmp_path / 'y.tif', extratags=[(0x112, 3, 1, orientation, True)])
    found = read_pixels((tmp_path / 'y.tif').read_bytes())
    np.testing.assert_array_equal(found, np.concatenate([upright, upright[..., :2]], 2))


def test_orientation_palettes_and_two_levels_are_followed(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn clockwise makes it upright
    Image.fromarray(COLOUR).save(tmp_path / 'x.tif', exif=exif)
    upright = read_pixels((tmp_path / 'x.tif').read_bytes())
    np.testing.assert_array_equal(upright, np.rot90(COLOUR, -1))
    palette = Image.fromarray(COLOUR).quantize(8)
    for name in ('x.png', 'x.tif'):
        palette.save(tmp_path / name)
        found = read_pixels((tmp_path / name).read_bytes())
        np.testing.assert_array_equal(found, np.asarray(palette.convert('RGB')))
    levels = Image.fromarray(COLOUR).convert('1')
    levels.save(tmp_path / 'x.tif')
    found = read_pixels((tmp_path / 'x.tif').read_bytes())
    np.testing.assert_array_equal(found[..., 0], np.asarray(levels.convert('L')))


def test_of_pages_of_8_bits_the_first_is_read_and_others_are_refused(tmp_path):
    for dtype in (np.uint8, np.uint16):
        stack = np.random.default_rng(0).integers(0, 256, (3, 8, 9)).astype(dtype)
        tifffile.imwrite(tmp_path / 'x.tif', stack, photometric='minisblack')
        content = (tmp_path / 'x.tif').read_bytes()
        if dtype == np.uint8:
            np.testing.assert_array_equal(read_pixels(content)[..., 0], stack[0])
            continue
        with pytest.raises(ValueError, match='has 3 pages; write each as a file, or all as the'):
            read_pixels(content)
    # What the sentence says does.
    tifffile.imwrite(tmp_path / 'x.tif', stack, photometric='minisblack', planarconfig='separate')
    found = read_pixels((tmp_path / 'x.tif').read_bytes())
    np.testing.assert_array_equal(found, np.moveaxis(stack, 0, 2))


@pytest.mark.parametrize('way', ['many channels', 'deflate', 'LZW', 'colours, 16 bits, PNG'])
def test_damaged_files_are_refused_in_a_sentence(way, tmp_path):
    """A byte in a hundred is another; files end early."""
    name, image, save = WAYS[way]
    save(image, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(1)
    damaged = [whole[:end] for end in (0, 3, 8, 60, len(whole) // 2)]
    for _ in range(40):
        part = bytearray(whole)
        for place in rng.integers(0, len(part), len(part) // 100 + 1):
            part[place] = rng.integers(256)
        damaged.append(bytes(part))
    refused = 0
    for content in damaged:
        try:
            assert read_pixels(content).ndim == 3
        except ValueError as error:
            refused += 1
            assert str(error).startswith(('is no ', 'has '))
    assert refused >= 5


def test_images_of_another_kind_do_not_fit():
    assert fit_channels(GREY, 3, 'uint16').shape == (8, 9, 3)
    for image, channels, dtype, told in (
        (GREY, 13, 'uint16', 'has 1 channels, and 13 are taken'),
        (DEEP, 3, 'uint16', 'has 13 channels, and 3 are taken'),
        (COLOUR, 3, 'uint16', 'has values of uint8, and others uint16'),
        (np.full_like(FLOAT, np.inf), 2, 'float32', 'infinite or no number'),
    ):
        with pytest.raises(ValueError, match=told):
            fit_channels(image, channels, dtype)


def test_mean_and_deviation_are_those_of_the_values():
    images = [1000 * i + np.random.default_rng(i).integers(0, 4096, (40, 30, 2)) for i in range(5)]
    images = [np.dstack([x, np.full((40, 30), 7)]).astype(np.uint16) for x in images]
    mean, std = measure(images)
    values = np.concatenate(images).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, [*values.std(0)[:2], 1.0], rtol=1e-12)
    # A large image counts as a small one does. Every second pixel is looked at, of blocks of eight.
    large = np.kron(images[4], np.ones((8, 8, 1), np.uint16))
    mean, _ = measure([images[0], large])
    np.testing.assert_allclose(mean, measure([images[0], images[4]])[0], rtol=1e-12)
