import re
from pathlib import Path

import pytest
from mmpretrain.registry import DATASETS

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


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'wnids\.txt is missing; unpack'):
        build(tmp_path, 'train')
    root = write_tiny_imagenet(tmp_path / 'tiny')
    notes = root / 'val' / 'val_annotations.txt'
    for line, told in {
        'val_3.JPEG\tn00000099\t1\t2\t3\t4': "class 'n00000099'",
        'val_3.JPEG\tn00000010\t1\t2\t3': re.escape("box ['1', '2', '3']"),
    }.items():
        before = notes.read_text()
        notes.write_text(f'{before}{line}\n')
        with pytest.raises(ValueError, match=f'val_3.JPEG has class .*{told}|{told}'):
            build(root, 'val')
        notes.write_text(before)
