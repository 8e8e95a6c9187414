import numpy as np
import pytest
import skimage.data
from mmpretrain.registry import TRANSFORMS

from ser_mm.datasets import Corrupt
from ser_mm.evaluation.robustness import CORRUPTIONS


def test_a_corruption_depends_on_the_image_alone():
    photo = skimage.data.astronaut()[100:148, 200:248, ::-1]
    for name in CORRUPTIONS:
        corrupt = TRANSFORMS.build(dict(type='Corrupt', corruption=name, severity=3))
        state = np.random.get_state()[1].copy()
        first = corrupt(dict(img=photo.copy(), img_path='a'))['img']
        assert first.shape == photo.shape and first.dtype == np.uint8
        assert (np.random.get_state()[1] == state).all()
        np.random.rand()
        again = corrupt(dict(img=photo.copy(), img_path='a'))['img']
        assert (first == again).all() and (first != photo).any(), name
    # Colours keep their order: brighter, and blue stays blue.
    blue = np.zeros((32, 32, 3), np.uint8) + np.uint8([200, 30, 30])
    image = Corrupt('brightness', 1)(dict(img=blue, img_path='a'))['img']
    assert (image[0, 0] > blue[0, 0]).any() and image[0, 0].argmax() == 0
    with pytest.raises(ValueError, match="corruption='rain', severity=1: choose one of"):
        Corrupt('rain', 1)


def test_an_image_without_a_file_is_known_by_its_pixels():
    """As those of CIFAR and STL-10: it was a KeyError."""
    photo = np.ascontiguousarray(skimage.data.astronaut()[100:148, 200:248, ::-1])
    corrupt = Corrupt('gaussian_noise', 3)
    first, again, other = (corrupt(dict(img=x))['img'] for x in (photo, photo.copy(), photo + 1))
    assert (first == again).all()
    assert (first.astype(int) - photo != other.astype(int) - (photo + 1)).mean() > 0.5


@pytest.mark.parametrize('shape', [(48, 48), (48, 48, 1), (24, 48, 3)])
def test_what_corruptions_are_not_for_is_refused(shape):
    """A grey image was mirrored, and got three channels."""
    said = f'an image is {" x ".join(map(str, shape))}, and corruptions are for .* or more; load'
    with pytest.raises(ValueError, match=said):
        Corrupt('brightness', 1)(dict(img=np.zeros(shape, np.uint8), img_path='x.png'))


@pytest.mark.parametrize(('path', 'red'), [(dict(img_path='a'), 2), ({}, 0)])
def test_stains_are_brown_in_either_order_of_channels(path, red):
    """BGR of a file, RGB of CIFAR, where they were blue."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    means = Corrupt('spatter', 5)(dict(img=grey, **path))['img'].mean((0, 1))
    assert means[red] > means[1] > means[2 - red]
