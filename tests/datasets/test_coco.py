"""Annotation files with defects are refused in one sentence, plausible ones are not."""

import copy
import json
import math
import re

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ser_mm.datasets import check_annotations, read_coco

NAN = math.nan


def content(images=3, each=5):
    """A valid file: masks as polygons, and a crowd as a run-length code."""
    coco = dict(
        images=[
            dict(id=i, file_name=f'{i}.jpg', width=100, height=80) for i in range(1, images + 1)
        ],
        categories=[dict(id=7, name='cat'), dict(id=9, name='dog')],
        annotations=[],
    )
    for i in range(images * each):
        x, y = 5 * i, 3.0 * i
        coco['annotations'].append(
            dict(
                id=i + 1,
                image_id=i % images + 1,
                category_id=(7, 9)[i % 2],
                bbox=[x, y, 20, 30.5],
                area=300,
                iscrowd=0,
                segmentation=[[x, y, x + 20, y, x, y + 30.5]],
            )
        )
    coco['annotations'][-1] |= dict(
        iscrowd=1, segmentation=dict(size=[80, 100], counts=[7900, 100])
    )
    return coco


def check(coco, **needs):
    return check_annotations(coco, 'train.json', **(dict(masks=True, evaluation=True) | needs))


def mended(coco, key, change, index=1):
    """With fields of one entry replaced; a value of ... leaves the field out."""
    coco = copy.deepcopy(coco)
    for name, value in change.items():
        if value is ...:
            del coco[key][index][name]
        else:
            coco[key][index][name] = value
    return coco


def test_a_valid_file_is_summarized():
    summary = check(content())
    assert summary.categories == {7: 'cat', 9: 'dog'}
    assert sorted(summary.images) == [1, 2, 3]
    assert summary.objects == {7: 7, 9: 7}  # 15 of which one, of a cat, is a crowd
    assert summary.notes == []


IDS = (..., None, NAN, 1.5, [], {})
NUMBERS = (..., None, '', '100', [], {}, NAN, math.inf, 0, -1, 2.5)
NAMES = (..., None, '', 5, [], {})
POLYGONS = (..., None, '', 'x', [], {}, 5, [1, 2, 3, 4, 5, 6], [['a'] * 6], [[NAN] * 6], [None])
CODES = (
    dict(size=[100, 80], counts=[7900, 100]),
    dict(size=[80, 100], counts=[7900]),
    dict(size=[80, 100], counts=['a']),
    dict(size=[80, 100]),
    dict(counts=[8000]),
    dict(size=[80, 100], counts='garbage'),
    dict(size=[80, 100], counts='\u00e9'),
)
BOXES = (
    *(..., None, '', 'box', [], {}, 5, [1, 2, 3], [1, 2, 3, 4, 5], ['1', '2', '3', '4']),
    *([1, 2, NAN, 4], [math.inf, 2, 3, 4], [1, 2, -3, 4], [1, 2, 3, -4], [[1, 2], [3, 4]]),
    *([None] * 4, [10**400, 1, 1, 1]),
)
DEFECTS = {
    ('images', 'id'): (*IDS, 1),
    ('images', 'file_name'): NAMES,
    ('images', 'width'): NUMBERS,
    ('images', 'height'): NUMBERS,
    ('categories', 'id'): (*IDS, 7),
    ('categories', 'name'): (*NAMES, 'cat'),
    ('annotations', 'id'): (*IDS, 1, 'a1'),
    ('annotations', 'image_id'): (*IDS, 99, '1'),
    ('annotations', 'category_id'): (*IDS, 0, 8, '7'),
    ('annotations', 'bbox'): BOXES,
    ('annotations', 'area'): (..., None, '', '300', [], {}, NAN, math.inf),
    ('annotations', 'iscrowd'): (..., None, '0', 2, [], NAN),
    ('annotations', 'segmentation'): (*POLYGONS, *CODES),
}


@pytest.mark.parametrize(
    ('key', 'name', 'value'), [(*place, v) for place, values in DEFECTS.items() for v in values]
)
def test_a_defect_is_named(key, name, value):
    with pytest.raises(ValueError) as error:
        check(mended(content(), key, {name: value}))
    sentence = str(error.value)
    assert sentence.startswith('train.json: ') and name in sentence and '\n' not in sentence
    assert re.search(r'; (give|number|write|add|make|remove|merge)\b', sentence), sentence
    if value is ... or (name, value) == ('iscrowd', None):
        assert 'missing' in sentence
    elif not (isinstance(value, dict) and value):  # of a run-length code, a part is named
        assert repr(value)[:40] in sentence
    if name != 'id' and value != 'cat':  # which two have
        assert f'id {content()[key][1]["id"]}' in sentence


@pytest.mark.parametrize(('key', 'entry'), [(k, e) for k in content() for e in (None, 5, 'a', [])])
def test_an_entry_that_is_not_an_object_is_named(key, entry):
    coco = content()
    coco[key][1] = entry
    with pytest.raises(ValueError, match=rf'train.json: 1 of .*{key}\[1\]; write an object'):
        check(coco)


@pytest.mark.parametrize('key', content())
@pytest.mark.parametrize('value', [..., None, 5, '', {}, [], {'1': {}}])
def test_a_list_that_is_missing_is_named(key, value):
    coco = content() | {key: value}
    if value is ...:
        del coco[key]
    if value == [] and key == 'annotations':  # whether it may be so depends on the other data
        assert sum(check(coco).objects.values()) == 0
        return
    with pytest.raises(ValueError, match=rf"^train.json.*'{key}'.*; (make|export)"):
        check(coco)


def test_examples_and_a_count():
    coco = content()
    for entry in coco['annotations'][:5]:
        del entry['bbox']
    coco['annotations'][6]['area'] = 'big'
    with pytest.raises(ValueError) as error:
        check(coco)
    assert str(error.value) == (
        "train.json: 5 of 15 annotations have 'bbox' missing: id 1, id 2, id 3, ...; give "
        '[x, y, width, height] in pixels, or remove the annotation. '
        'There are defects of 1 other kinds, too.'
    )


def test_corners_are_told_from_sizes():
    coco = content()
    for entry in coco['annotations']:
        x, y, w, h = entry['bbox']
        entry['bbox'] = [x, y, min(x + w, 100), min(y + h, 80)]
    with pytest.raises(ValueError, match=r'seems to be \[x1, y1, x2, y2\]'):
        check(coco)


SKIPPED = [
    (dict(bbox=[5, 5, 0, 30]), 'of less than a pixel'),
    (dict(bbox=[0.1, 0.2, 0.3, 0.4]), 'fractions of the image'),
    (dict(bbox=[100, 5, 9, 30]), 'outside of the image'),
    (dict(bbox=[5, -40, 20, 30]), 'outside of the image'),
    (dict(area=0), 'that is not positive'),
    (dict(segmentation=[[1, 2, 3, 4]]), 'without three points'),
    (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'without three points'),
]


@pytest.mark.parametrize(('change', 'message'), SKIPPED)
def test_what_mmdetection_skips_is_noted_and_refused_if_common(change, message):
    (note,) = check(mended(content(), 'annotations', change)).notes
    assert note.startswith('train.json: 1 of 15 annotations have') and message in note
    coco = content()
    coco['annotations'] = [entry | change for entry in coco['annotations']]
    with pytest.raises(ValueError, match=message):
        check(coco)


@pytest.mark.parametrize(
    'change',
    [
        dict(bbox=[-0.4, -0.2, 100.6, 80.3]),
        dict(bbox=[80, 50, 21, 31]),
        dict(bbox=[5, 5, 1, 1]),
        dict(bbox=[5.0, 5.0, 20.0, 1e1]),
        dict(area=1e-3),
        dict(iscrowd=True),
        dict(iscrowd=0.0),
        dict(id=1e6),
        dict(category_id=7.0),
        dict(image_id=2.0),
        dict(segmentation=[[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]),
        dict(segmentation=dict(size=[80, 100], counts='0Pj7')),
        dict(score=0.5, attributes={}, ignore=0),
    ],
)
def test_plausible_annotations_are_accepted(change):
    assert check(mended(content(), 'annotations', change)).notes == []


def test_plausible_files_are_accepted():
    coco = content() | dict(info={}, licenses=[])
    coco['images'] += [dict(id=4, file_name='sub/empty.png', width=1, height=1)]
    coco['categories'] += [dict(id=1, name='without objects', supercategory='none')]
    check(coco)
    coco['images'][0].update(width=100.0, height=80.0)
    check(coco)
    for entry in coco['annotations']:  # for boxes alone, and training alone
        del entry['segmentation'], entry['iscrowd']
    check(coco, masks=False, evaluation=False)
    texts = json.loads(
        re.sub(r'"(id|image_id|category_id)": (\d+)', r'"\1": "\2"', json.dumps(coco))
    )
    check(texts, masks=False, evaluation=False)
    del coco['annotations']
    check(coco, masks=False, annotated=False)


def test_what_reaches_far_beyond_and_an_id_of_0_are_noted():
    coco = mended(content(), 'annotations', dict(bbox=[5, 5, 200, 30]))
    (note,) = check(coco).notes
    assert 'far beyond' in note and 'id 2' in note
    coco = mended(content(), 'annotations', dict(id=0))
    (note,) = check(coco).notes
    assert 'counts the annotation with id 0 as missed' in note
    assert check(coco, evaluation=False).notes == []


@pytest.mark.parametrize('first', [0, 1])
def test_pycocotools_counts_an_id_of_0_as_missed(tmp_path, first):
    coco = content()
    for entry in coco['annotations']:
        entry['id'] += first - 1
    (tmp_path / 'val.json').write_text(json.dumps(coco))
    truth = COCO(tmp_path / 'val.json')
    objects = [dict(entry, score=1.0) for entry in coco['annotations'] if not entry['iscrowd']]
    result = COCOeval(truth, truth.loadRes(objects), 'bbox')
    result.evaluate(), result.accumulate(), result.summarize()
    assert (result.stats[0] > 1 - 1e-9) == (first > 0)
    assert len(check(coco).notes) == (first == 0)


TEXT = json.dumps(content()).encode()


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'is empty'),
        (b' \n', 'is empty'),
        (TEXT[:-1], 'not complete JSON'),
        (TEXT[: len(TEXT) // 2], 'not complete JSON'),
        (TEXT + b'}', 'not complete JSON'),
        (b'[' * 100_000, 'not complete JSON'),
        (b'<html>', 'not complete JSON'),
        (TEXT.decode().encode('utf-16'), 'not UTF-8'),
        (b'\xef\xbb\xbf' + TEXT, 'byte order mark'),
        ('{"images": "\u00e9"}'.encode('latin-1'), 'not UTF-8'),
        (b'[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', 'holds a list'),
        (b'null', 'holds a NoneType'),
        (b'"text"', 'holds a str'),
        (b'{}', "has no 'images'"),
    ],
)
def test_a_file_that_is_not_an_object(tmp_path, data, message):
    path = tmp_path / 'train.json'
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        check_annotations(read_coco(path), path)
    assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match='is a folder'):
        read_coco(tmp_path)
