import cv2
import numpy as np
import tifffile
from PIL import Image

from ser_mm.datasets import LoadChannels, LoadReadableImage
from ser_mm.experiments.report import _thumbnail


def test_pictures_of_more_than_8_bits(tmp_path):
    pixels = np.linspace(20000, 40000, 64 * 64).reshape(64, 64)
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / 'deep.png')
    file = str(tmp_path / 'deep.png')
    small = np.asarray(_thumbnail(file, LoadReadableImage()))
    # The upper 8 bits, which are what the network gets.
    assert small.shape == (64, 64, 3) and small.min() == 20000 >> 8 and small.max() == 40000 >> 8
    # Two deviations from the mean are black and white.
    load = LoadChannels(channels=1, dtype='uint16', mean=[30000], std=[5000])
    small = np.asarray(_thumbnail(file, load))
    assert small.shape == (64, 64, 3) and small.min() == 0 and small.max() == 255
    assert abs(small.mean() - 127.5) < 1


def test_pictures_are_what_the_network_gets(tmp_path):
    """Pillow has other limits than the loader, other types, and leaves photographs on the side."""
    red = np.zeros((60, 90, 3), np.uint8)
    red[:, :45, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(red).save(tmp_path / 'turned.jpg', exif=exif, quality=95)
    small = np.asarray(_thumbnail(str(tmp_path / 'turned.jpg'), LoadReadableImage()))
    assert small.shape == (90, 60, 3) and small[10, 30, 0] > 200 > 50 > small[80, 30, 0]
    tifffile.imwrite(tmp_path / 'float.tif', np.ones((20, 30, 3), np.float32))
    load = LoadReadableImage(imdecode_backend='tifffile')
    assert load(dict(img_path=str(tmp_path / 'float.tif')))['img'].dtype == np.float32
    assert np.asarray(_thumbnail(str(tmp_path / 'float.tif'), load)).shape == (20, 30, 3)


def test_a_picture_of_more_pixels_than_pillow_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)  # of 89 million, for a smaller file
    cv2.imwrite(str(tmp_path / 'huge.jpg'), np.full((60, 90, 3), 99, np.uint8))
    small = np.asarray(_thumbnail(str(tmp_path / 'huge.jpg'), LoadReadableImage()))
    assert small.shape == (60, 90, 3)
