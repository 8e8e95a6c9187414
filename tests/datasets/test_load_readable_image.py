import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.exposure import rescale_intensity

from ser_mm.datasets import LoadReadableImage

COLOUR = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
TWELVE_BITS = np.random.default_rng(0).integers(0, 4096, (8, 9), dtype=np.uint16)
BITS, ALPHA, PAGES = 'has 16 bits a channel', 'has an alpha channel', 'has 3 pages'


def write(image, path):
    assert cv2.imwrite(str(path), image)


def with_alpha(path):
    Image.fromarray(np.dstack([COLOUR, COLOUR[..., 0]])).save(path)


def with_pages(path):
    pages = [Image.fromarray(COLOUR)] * 3
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.fixture
def told(monkeypatch):
    """What the transform logs."""
    sentences = []
    monkeypatch.setattr(
        'ser_mm.datasets.transforms.load_readable_image.print_log',
        lambda sentence, logger, level: sentences.append(sentence),
    )
    return sentences


@pytest.mark.parametrize(
    ('name', 'save', 'lost'),
    [
        ('grey.png', lambda path: write(TWELVE_BITS, path), BITS),
        ('colour.png', lambda path: write(np.dstack([TWELVE_BITS] * 3), path), BITS),
        ('grey.tif', lambda path: write(TWELVE_BITS, path), BITS),
        ('colour.TIFF', lambda path: write(np.dstack([TWELVE_BITS] * 3), path), BITS),
        ('alpha.PNG', with_alpha, ALPHA),
        ('alpha.tif', with_alpha, ALPHA),
        ('pages.tif', with_pages, PAGES),
    ],
)
def test_what_is_lost_is_told_once(name, save, lost, told, tmp_path):
    """It was cut to 8 bits, to three channels or to the first page without a word."""
    load, path = LoadReadableImage(), tmp_path / name
    save(path)
    for _ in range(2):
        assert load(dict(img_path=str(path)))['img'].shape == (8, 9, 3)
    (sentence,) = told
    assert sentence.startswith(f'{path} {lost}')


def test_an_unreadable_file_is_skipped_or_an_error(told, tmp_path):
    path = tmp_path / 'x.png'
    path.write_bytes(b'no image')
    assert LoadReadableImage()(dict(img_path=str(path))) is None
    (sentence,) = told
    assert sentence.startswith(f'Skipped an unreadable image, {path}')
    with pytest.raises(Exception, match='failed to load image'):
        LoadReadableImage(skip=False)(dict(img_path=str(path)))
    assert len(told) == 1


@pytest.mark.parametrize('name', ['x.png', 'x.tif', 'x.jpg', 'x.webp', 'palette.png'])
def test_nothing_is_told_of_what_is_read_whole(name, told, tmp_path):
    image = Image.fromarray(COLOUR)
    (image.quantize(8) if 'palette' in name else image).save(tmp_path / name)
    assert LoadReadableImage()(dict(img_path=str(tmp_path / name))) is not None
    assert not told


def test_nothing_is_told_where_bits_are_kept(told, tmp_path):
    write(TWELVE_BITS, tmp_path / 'x.png')
    loaded = LoadReadableImage(color_type='unchanged')(dict(img_path=str(tmp_path / 'x.png')))
    np.testing.assert_array_equal(loaded['img'], TWELVE_BITS)
    assert not told


def test_the_remedy_for_many_bits(told, tmp_path):
    path = tmp_path / 'x.png'
    write(TWELVE_BITS, path)
    assert LoadReadableImage()(dict(img_path=str(path)))['img'].max() < 16  # next to black
    assert 'next to black' in told.pop()
    write(rescale_intensity(TWELVE_BITS, out_range='uint8'), path)
    read = LoadReadableImage()(dict(img_path=str(path)))['img'][..., 0]
    low, high = int(TWELVE_BITS.min()), int(TWELVE_BITS.max())
    wanted = (TWELVE_BITS - low) / (high - low) * 255
    assert np.abs(read - wanted).max() <= 1  # of rounding, which may be up or down
    assert not told
