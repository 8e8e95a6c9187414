import numpy as np
import pytest
from PIL import Image

from ser_mm.evaluation.tsne import choose_images, measure_classes


def test_numbers_of_known_maps():
    """NumPy draws the same numbers on every processor; of noise, half the neighbours agree."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 500)
    noise = rng.normal(size=(1000, 2))
    apart = measure_classes(noise + 1000 * labels[:, None], labels)
    assert apart['agreement'] == 1 and apart['silhouette'] > 0.99
    mixed = measure_classes(noise, labels)
    assert mixed['agreement'] == pytest.approx(0.5, abs=0.05)
    assert mixed['silhouette'] == pytest.approx(0, abs=0.01)


def test_a_class_without_images_is_left_out_or_refused(tmp_path):
    """Every class after it was drawn under the name of the one before."""
    lines = []
    for i in range(12):
        Image.new('RGB', (48, 48), (i, 0, 0)).save(tmp_path / f'{i}.png')
        lines.append(f'{i}.png {[0, 1, 3][i % 3]}')
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    dataset = dict(
        type='mmpretrain.ImageSource',
        data_root=str(tmp_path / 'list.txt'),
        split='val',
        with_label=True,
        pipeline=[],
    )
    subset, classes = choose_images(dataset, per_class=2)
    assert classes == ['0', '1', '3'] and sorted(subset['indices']) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match='classes 2: choose two or more that have images, of 0, 1'):
        choose_images(dataset, ['0', '2'])
    with pytest.raises(ValueError, match='choose two or more'):
        choose_images(dataset, ['3', '3'])
