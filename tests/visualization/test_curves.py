import numpy as np
from PIL import Image

from ser_mm.visualization.curves import draw_curves


def test_a_legend_of_many_curves_stays_in_the_picture(tmp_path):
    names = [f'an arm with a long name, {i}' for i in range(8)]
    panel = {name: [(1, 0.1 * i, 0.0), (2, 0.2, 0.0)] for i, name in enumerate(names)}
    draw_curves({'one': panel, 'other': panel}, tmp_path / 'curves.png')
    picture = np.asarray(Image.open(tmp_path / 'curves.png').convert('L'))
    assert (picture[:, 0] == 255).all() and (picture[:, -1] == 255).all()
