"""Boxes and masks stay on their objects, whatever the EXIF orientation of the image."""

import json

import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from PIL import Image

from ser_mm.datasets import CheckImageSize
from ser_mm.engine.coco import check_coco
from tests.support.detection import NAMES, load, on_digits, with_classes

BOX = (90, 20, 60, 40)  # x, y, width, height; not symmetric in any way
WIDTH, HEIGHT = 180, 120


@pytest.fixture(params=range(1, 9), ids='orientation{}'.format)
def orientation(request):
    return request.param


@pytest.fixture
def turned(orientation, tmp_path):
    """A COCO data set of one JPEG, a bright box on black, with an EXIF orientation."""
    x, y, w, h = BOX
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[y : y + h, x : x + w] = 255
    exif = Image.Exif()
    exif[274] = orientation
    annotation = dict(
        **dict(id=1, image_id=1, category_id=1, bbox=BOX, area=w * h, iscrowd=0),
        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
    )
    content = dict(
        images=[dict(id=1, file_name='photo.jpg', width=WIDTH, height=HEIGHT)],
        categories=[dict(id=i + 1, name=str(i)) for i in range(10)],
        annotations=[annotation],
    )
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        Image.fromarray(image).save(tmp_path / split / 'photo.jpg', exif=exif, quality=95)
        (tmp_path / f'{split}.json').write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize('name', ['mask-rcnn_vits16', 'retinanet_r50'])
def test_boxes_and_masks_are_on_their_objects(turned, name):
    init_default_scope('mmdet')
    cfg = with_classes(load(name, **on_digits(turned)), 10)
    check_coco(cfg)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.pipeline[3 if split == 'train' else 2].scale = (180, 120)
        item = DATASETS.build(cfg[f'{split}_dataloader'].dataset)[0]
        image = item['inputs'].float().mean(0).numpy()
        assert image.shape == (HEIGHT, WIDTH)
        instances = item['data_samples'].gt_instances
        x1, y1, x2, y2 = instances.bboxes.tensor[0].int().tolist()
        inside = np.zeros(image.shape, bool)
        inside[y1:y2, x1:x2] = True
        masks = [inside]
        if 'masks' in instances:
            masks.append(instances.masks.masks[0].astype(bool))
        for mask in masks:  # of JPEG, edges are not sharp
            assert image[mask].mean() > 240 and image[~mask].mean() < 15


@pytest.mark.parametrize('name', NAMES)
def test_every_pipeline_reads_images_alike(name):
    cfg = load(name)
    pipelines = [cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'val', 'test')]
    for pipeline in [*pipelines, *filter(None, [cfg.get('tta_pipeline')])]:
        assert pipeline[0].color_type == 'color_ignore_orientation'
        assert pipeline[1].type == 'mmpretrain.CheckImageSize'


def test_a_pipeline_that_turns_images_is_told_before_training(turned, orientation):
    cfg = with_classes(load('retinanet_r50', **on_digits(turned)), 10)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.pipeline[0].pop('color_type')
    if orientation < 5:
        check_coco(cfg)  # of the same size either way
        return
    with pytest.raises(
        ValueError, match='photo.jpg is read as 120 x 180 .*color_ignore_orientation'
    ):
        check_coco(cfg)
    with pytest.raises(ValueError, match='photo.jpg is read as 120 x 180 pixels'):
        init_default_scope('mmdet')
        DATASETS.build(cfg.val_dataloader.dataset)[0]


def test_new_images_have_no_size_to_compare():
    results = dict(img_path='new.jpg', img_shape=(5, 7))
    assert CheckImageSize()(dict(results)) == results
    assert CheckImageSize()(results | dict(height=5, width=7))
    with pytest.raises(ValueError, match='new.jpg is read as 7 x 5 .*use the image that was'):
        CheckImageSize()(results | dict(height=50, width=70))
