import numpy as np
import pytest
from mmpretrain.registry import TRANSFORMS
from scipy.stats import chisquare

from ser_mm.geometry import act_on_array


@pytest.mark.parametrize('width', [4, 5])
def test_elements_are_uniform_and_depend_on_the_place_alone(width):
    image = np.arange(4 * width * 3, dtype=np.uint8).reshape(4, width, 3)
    allowed = range(8) if width == 4 else (0, 2, 4, 6)
    moved = {act_on_array(image, element).tobytes(): element for element in allowed}
    assert len(moved) == len(allowed)
    move = TRANSFORMS.build(dict(type='MoveByD4'))

    def element(place):
        found = move(dict(img=image.copy(), img_path='any', sample_idx=place))['img']
        assert found.shape == image.shape and found.flags.c_contiguous
        return moved[found.tobytes()]

    state = np.random.get_state()[1].copy()
    drawn = [element(place) for place in range(4000)]
    assert (np.random.get_state()[1] == state).all()
    np.random.rand()
    assert [element(place) for place in range(100)] == drawn[:100]
    assert chisquare(np.bincount(drawn)[list(allowed)]).pvalue > 1e-6


def test_an_image_without_a_place_is_refused():
    with pytest.raises(ValueError, match='MoveByD4: sample_idx is missing'):
        TRANSFORMS.build(dict(type='MoveByD4'))(dict(img=np.zeros((4, 4, 3), np.uint8)))
