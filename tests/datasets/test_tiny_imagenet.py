import json
import re
from pathlib import Path

import pytest
from mmdet.datasets import CocoDataset
from mmpretrain.registry import DATASETS
from pycocotools.coco import COCO

from ser_mm.datasets import check_annotations, read_coco, write_tiny_imagenet_boxes
from ser_mm.engine.images import check_classes
from tests.support.tiny_imagenet import write_tiny_imagenet


def build(root, split):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    return DATASETS.build(
        dict(type='TinyImageNet', data_root=str(root), split=split, pipeline=pipeline)
    )


def test_images_labels_and_boxes_of_its_own_annotations(tmp_path):
    root = write_tiny_imagenet(tmp_path / 'tiny')
    train, val = build(root, 'train'), build(root, 'val')
    classes = train.metainfo['classes']
    assert classes == val.metainfo['classes'] == ('n00000010', 'n00000020', 'n00000030')
    assert (len(train), len(val)) == (12, 3)
    for i in range(12):
        info = train.get_data_info(i)
        path = Path(info['img_path'])
        assert path.parts[-3] == classes[info['gt_label']] and path.is_file()
        line = f'{path.name}\t' + '\t'.join(map(str, info['box']))
        assert line in (path.parents[1] / f'{path.parts[-3]}_boxes.txt').read_text().splitlines()
    assert [val.get_data_info(i)['gt_label'] for i in range(3)] == [0, 1, 2]
    sample = val[0]
    assert sample['inputs'].shape == (3, 64, 64) and int(sample['data_samples'].gt_label) == 0


def test_its_folders_are_not_taken_for_classes(tmp_path):
    """val has one folder, images, which train has not."""
    root = write_tiny_imagenet(tmp_path / 'tiny')
    sets = {x: dict(type='TinyImageNet', data_root=str(root), split=x) for x in ('train', 'val')}
    check_classes(sets)


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'wnids\.txt is missing; unpack'):
        build(tmp_path, 'train')
    root = write_tiny_imagenet(tmp_path / 'tiny')
    notes = root / 'val' / 'val_annotations.txt'
    for line, told in {
        'val_3.JPEG\tn00000099\t1\t2\t3\t4': "class 'n00000099'",
        'val_3.JPEG': "class ''",
        'val_3.JPEG\tn00000010\t1\t2\t3': re.escape("box ['1', '2', '3']"),
    }.items():
        before = notes.read_text()
        notes.write_text(f'{before}{line}\n')
        with pytest.raises(ValueError, match=f'val_3.JPEG has class .*{told}|{told}'):
            build(root, 'val')
        notes.write_text(before)


BOXES = {  # x_min, y_min, x_max, y_max, both ends within, and COCO's x, y, width, height
    (0, 0, 63, 63): [0, 0, 64, 64],
    (3, 10, 3, 40): None,  # no area
    (5, 6, 7, 9): [5, 6, 3, 4],
    (20, 40, 30, 40): None,
    (62, 1, 63, 63): [62, 1, 2, 63],
}


@pytest.fixture
def boxed(tmp_path):
    """A data set whose classes have the boxes above, in this order, to train on."""
    root = write_tiny_imagenet(tmp_path / 'tiny', per_class=len(BOXES))
    for notes in root.glob('train/*/*_boxes.txt'):
        files = [line.split('\t')[0] for line in notes.read_text().splitlines()]
        lines = ['\t'.join(map(str, [file, *box])) for file, box in zip(files, BOXES, strict=True)]
        notes.write_text('\n'.join(lines))
    return root


@pytest.mark.parametrize('class_agnostic', [True, False])
def test_boxes_as_coco_annotations(boxed, tmp_path, class_agnostic):
    out = tmp_path / 'boxes'
    counts = write_tiny_imagenet_boxes(boxed, out, class_agnostic=class_agnostic)
    assert counts == dict(train=dict(images=9, left_out=6), val=dict(images=3, left_out=0))
    names = ['n00000010', 'n00000020', 'n00000030']
    categories = ['object'] if class_agnostic else names
    assert (out / 'classes.txt').read_text().splitlines() == categories
    coco = COCO(out / 'train.json')
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == categories
    expected = [
        (f'train/{name}/images/{name}_{n}.JPEG', box, 1 if class_agnostic else label)
        for label, name in enumerate(names, 1)
        for n, box in enumerate(BOXES.values())
        if box
    ]
    assert [
        (coco.imgs[x['image_id']]['file_name'], x['bbox'], x['category_id'])
        for x in coco.loadAnns(coco.getAnnIds())
    ] == expected
    assert all(x['area'] == x['bbox'][2] * x['bbox'][3] for x in coco.anns.values())
    for split in ('train', 'val'):
        file = out / f'{split}.json'
        summary = check_annotations(read_coco(file), file, evaluation=True)
        assert summary.notes == [] and sum(summary.objects.values()) == counts[split]['images']

    dataset = CocoDataset(
        ann_file=str(out / 'train.json'),
        data_prefix=dict(img=str(boxed)),
        metainfo=dict(classes=tuple(categories)),
        filter_cfg=dict(filter_empty_gt=True, min_size=1),
    )
    found = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [(x['img_path'], x['instances'][0]['bbox']) for x in found] == [
        (f'{boxed}/{file}', [x, y, x + w, y + h]) for file, (x, y, w, h), _ in expected
    ]
    assert all(Path(x['img_path']).is_file() for x in found)


def test_the_first_boxes_of_each_class_once(boxed, tmp_path):
    out = tmp_path / 'boxes'
    counts = write_tiny_imagenet_boxes(boxed, out, train=2, val=1)
    assert counts['train'] == dict(images=6, left_out=3)
    content = json.loads((out / 'train.json').read_text())
    assert [x['bbox'] for x in content['annotations']] == [[0, 0, 64, 64], [5, 6, 3, 4]] * 3
    times = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert sorted(file.name for file in times) == ['classes.txt', 'train.json', 'val.json']
    (out / 'val.json').unlink()  # as if it had been interrupted
    assert write_tiny_imagenet_boxes(str(boxed), str(out), 2, 1) == counts
    assert (out / 'train.json').stat().st_mtime_ns == times[out / 'train.json']
    assert (out / 'val.json').is_file()

    (out / 'val.json').unlink()
    with pytest.raises(FileExistsError, match=r'train\.json holds something else; remove it'):
        write_tiny_imagenet_boxes(boxed, out, 1, 1)
    assert not (out / 'val.json').exists()
    with pytest.raises(ValueError, match='val=0 images of each class; give 1 or more'):
        write_tiny_imagenet_boxes(boxed, out, 2, 0)
