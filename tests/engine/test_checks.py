"""What is wrong with data and heads is told before training."""

import pytest

from ser_mm.datasets import write_bundled_digits
from ser_mm.engine.checks import check_coco, check_data
from tests.support.detection import DIGITS, load, on_digits, with_classes


def test_bad_coco_data_is_told_before_training(tmp_path):
    root = tmp_path / 'digits'
    write_bundled_digits(root, num_train=4, num_val=2, size=96)

    def config(**options):
        cfg = load('mask-rcnn_vits16', **(on_digits(root) | options))
        return with_classes(cfg, 10)

    check_data(config())
    check_coco(config())
    with pytest.raises(FileNotFoundError, match=r'train_dataloader.dataset.ann_file = .none.json.'):
        check_data(config(**{'train_dataloader.dataset.ann_file': 'none.json'}))
    with pytest.raises(FileNotFoundError, match=r'val_evaluator.ann_file = .none.json.'):
        check_coco(config(**{'val_evaluator.ann_file': 'none.json'}))
    wrong_head = config()
    wrong_head.model.roi_head.mask_head.num_classes = 80
    with pytest.raises(ValueError, match=r'mask_head.num_classes = 80, .* 10 classes'):
        check_coco(wrong_head)
    with pytest.raises(ValueError, match=r'train_dataloader.dataset.metainfo.classes .* without'):
        check_coco(config(**{'train_dataloader.dataset.metainfo.classes': ('cat', 'dog')}))
    with pytest.raises(ValueError, match=r'val_dataloader.dataset.metainfo.classes .* order'):
        check_coco(config(**{'val_dataloader.dataset.metainfo.classes': DIGITS[::-1]}))
