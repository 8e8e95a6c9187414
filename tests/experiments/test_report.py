import numpy as np
from PIL import Image

from ser_mm.datasets import LoadChannels, LoadReadableImage
from ser_mm.experiments.report import _thumbnail


def test_pictures_of_more_than_8_bits(tmp_path):
    pixels = np.linspace(20000, 40000, 64 * 64).reshape(64, 64)
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / 'deep.png')
    file = str(tmp_path / 'deep.png')
    small = np.asarray(_thumbnail(file, LoadReadableImage()))
    assert small.shape == (64, 64, 3) and small.min() == 0 and small.max() == 255
    assert abs(small.mean() - 127.5) < 1
    # Two deviations from the mean are black and white.
    load = LoadChannels(channels=1, dtype='uint16', mean=[30000], std=[5000])
    small = np.asarray(_thumbnail(file, load))
    assert small.shape == (64, 64, 3) and small.min() == 0 and small.max() == 255
    assert abs(small.mean() - 127.5) < 1
