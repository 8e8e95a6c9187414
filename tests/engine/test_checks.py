"""What is wrong with data is told before training."""

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmpretrain.datasets import CustomDataset

from ser_mm.engine.checks import check_data
from tests.support.detection import load


def test_an_annotation_file_that_is_missing_is_told(tmp_path):
    data = {f'{split}_dataloader.dataset.data_root': str(tmp_path) for split in ('train', 'val')}
    cfg = load('mask-rcnn_vits16', **data)
    with pytest.raises(FileNotFoundError, match=r'train_dataloader.dataset.ann_file = .*does not'):
        check_data(cfg)


class InOneFile(CustomDataset):
    """As of images in a database, which no folder shows."""

    def load_data_list(self):
        return [dict(img_path='0', gt_label=0)]


def check(kind, **places):
    dataset = dict(places, type=kind, with_label=False)
    check_data(Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset))))


def test_a_data_set_that_finds_its_images_otherwise_is_left_alone(tmp_path):
    (tmp_path / 'images.mdb').touch()
    check(InOneFile, data_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match='has no images'):
        check(CustomDataset, data_root=str(tmp_path))


def test_places_as_mmpretrain_takes_them(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'list.txt').write_text('a.png')
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    home = f'~/{tmp_path.name}'
    for places in (
        dict(data_root=tmp_path),
        dict(data_prefix=home),
        dict(ann_file=f'{home}/list.txt', data_prefix=home),
    ):
        assert len(CustomDataset(**places, with_label=False)) == 1
        check(CustomDataset, **places)
