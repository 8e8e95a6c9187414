"""What is wrong with data is told before training."""

import pytest

from ser_mm.engine.checks import check_data
from tests.support.detection import load


def test_an_annotation_file_that_is_missing_is_told(tmp_path):
    data = {f'{split}_dataloader.dataset.data_root': str(tmp_path) for split in ('train', 'val')}
    cfg = load('mask-rcnn_vits16', **data)
    with pytest.raises(FileNotFoundError, match=r'train_dataloader.dataset.ann_file = .*does not'):
        check_data(cfg)
