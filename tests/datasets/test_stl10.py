"""STL-10 as torchvision reads it, from files that are mapped into memory."""

import pickle

import numpy as np
import pytest
from mmengine.config import Config
from mmpretrain.registry import DATASETS
from torchvision.datasets import STL10 as OTHER

from ser_mm.datasets import STL10
from ser_mm.evaluation.data import check_evaluation
from tests.support.small_images import write_stl10


class Torchvisions(OTHER):
    """Of files of ours, whose sums are not those of STL-10."""

    def _check_integrity(self):
        return True


@pytest.mark.parametrize('split', ['unlabeled', 'train', 'test'])
def test_pixels_and_labels_are_torchvisions(split, tmp_path):
    root = write_stl10(tmp_path / 'stl10_binary')
    (root / 'class_names.txt').write_text('\n'.join(STL10.METAINFO['classes']))
    config = dict(
        type='STL10', data_root=str(root), split=split, pipeline=[dict(type='PackInputs')]
    )
    ours, other = DATASETS.build(config), Torchvisions(tmp_path, split)
    assert len(ours) == len(other) == 4 and list(ours.metainfo['classes']) == other.classes
    copied = pickle.loads(pickle.dumps(ours))  # as to the workers
    for i, (image, label) in enumerate(other):
        info = ours.get_data_info(i)
        assert np.array_equal(info['img'], np.asarray(image))
        assert info.get('gt_label') == (None if split == 'unlabeled' else label)
        assert np.array_equal(copied.get_data_info(i)['img'], info['img'])
        packed = ours[i]['inputs']
        assert np.array_equal(packed.permute(1, 2, 0), info['img'])
    info['img'][:] = 0  # a copy, not the file
    assert ours.get_data_info(3)['img'].any()
    assert len(DATASETS.build(dict(config, indices=2))) == 2


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'unlabeled_X\.bin is missing; unpack http'):
        STL10(tmp_path)
    root = write_stl10(tmp_path / 'stl10')
    labels = root / 'train_y.bin'
    for content, told in {b'\0\1\2\3': 'has 4 labels from 0 to 3', b'\1\2': 'has 2 labels'}.items():
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=f'train_y.bin {told}.* not 4 from 1 to 10; unpack'):
            STL10(root, 'train')
    images = root / 'test_X.bin'
    for content in (images.read_bytes()[:-1], b''):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=rf'test_X\.bin has {len(content)} bytes, no whole'):
            STL10(root, 'test')


def test_images_without_labels_are_refused_where_labels_are_needed(tmp_path):
    root = str(write_stl10(tmp_path / 'stl10'))
    splits = {
        'train': dict(type='STL10', data_root=root),
        'val': dict(type='STL10', data_root=root),
    }
    splits['val']['split'] = 'test'
    cfg = Config(dict(evaluation=splits))
    with pytest.raises(ValueError, match=r"evaluation\.train\.split = 'unlabeled', but labels"):
        check_evaluation(cfg)
    check_evaluation(cfg, labelled=False)
    cfg.evaluation.train.split = 'train'
    check_evaluation(cfg)
