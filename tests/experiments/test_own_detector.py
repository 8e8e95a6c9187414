"""Configs of detectors on own annotations."""

import numpy as np
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from PIL import Image

from ser_mm.experiments.own_detector import own_detector
from tests.support.own_boxes import CATEGORIES, QUICK, write_own_boxes


def test_classes_are_those_of_the_files_in_all_heads(tmp_path):
    data = tmp_path / 'data'
    write_own_boxes(data)
    files = data / 'train.json', data / 'val.json', data / 'photos', data / 'photos'
    cfg = own_detector('faster-rcnn_tiny', *files, QUICK)
    assert cfg.model.roi_head.bbox_head.num_classes == 3
    masks = own_detector('coco/mask-rcnn_vits16', *files, {})
    heads = masks.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == 3
    retina = own_detector('coco/retinanet_r50', *files, {})
    assert retina.model.bbox_head.num_classes == 3
    init_default_scope('mmdet')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == (4 if loader is cfg.train_dataloader else 2)
        for info in map(dataset.get_data_info, range(len(dataset))):
            pixels = np.asarray(Image.open(info['img_path']))
            assert len(info['instances']) == 3
            for instance in info['instances']:
                x, y, _, _ = instance['bbox']
                name = dataset.metainfo['classes'][instance['bbox_label']]
                assert pixels[y, x, list(CATEGORIES.values()).index(name)] == 255
