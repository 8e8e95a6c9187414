import random

import pytest
import skimage.data
from PIL import Image


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Forty JPEGs of odd sizes in a flat folder with a space in its name."""
    folder = tmp_path_factory.mktemp('data') / 'my images'
    folder.mkdir()
    rng = random.Random(0)
    photos = [Image.fromarray(getattr(skimage.data, x)()) for x in ('astronaut', 'coffee')]
    for number in range(40):
        photo = photos[number % 2]
        x, y = (rng.randint(0, side - 200) for side in photo.size)
        width, height = rng.randint(61, 199), rng.randint(61, 199)
        photo.crop((x, y, x + width, y + height)).save(folder / f'{number}.jpg')
    return folder
