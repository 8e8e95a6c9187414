"""A config of MMDetection is compared with its annotation files and images before training."""

import json
import re
import shutil

import pytest
from PIL import Image

from ser_mm.datasets import write_bundled_digits
from ser_mm.engine.checks import check_data
from ser_mm.engine.coco import check_coco
from ser_mm.engine.pretrained import check_pretrained
from tests.support.detection import DIGITS, load, on_digits, with_classes

TRAIN, VAL = 'train_dataloader.dataset', 'val_dataloader.dataset'


@pytest.fixture
def root(tmp_path):
    write_bundled_digits(tmp_path / 'digits', num_train=4, num_val=2, size=96)
    return tmp_path / 'digits'


def config(root, name='mask-rcnn_vits16', **options):
    return with_classes(load(name, **(on_digits(root) | options)), 10)


def test_data_that_fits_is_accepted(root, tmp_path):
    check_data(config(root))
    check_coco(config(root))
    names = tmp_path / 'classes.txt'
    names.write_text('\n'.join(DIGITS) + '\n')
    check_coco(config(root, **{f'{TRAIN}.metainfo.classes': str(names)}))
    check_coco(config(root, **{f'{TRAIN}.metainfo.classes': list(DIGITS)}))


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('val_evaluator.ann_file', 'none.json', r"val_evaluator.ann_file = 'none.json'"),
        ('val_evaluator.ann_file', '{root}/train.json', None),  # has an image of each id
        ('model.roi_head.mask_head.num_classes', 80, r'mask_head.num_classes = 80, .* 10 classes'),
        (f'{TRAIN}.metainfo.classes', ('cat', 'dog'), f'{TRAIN}.metainfo.classes .* without'),
        (f'{VAL}.metainfo.classes', DIGITS[::-1], f'{VAL}.metainfo.classes .* order'),
        (f'{TRAIN}.metainfo.classes', 'cat', r"classes = 'cat' is neither a file .* write \[cat\]"),
        (
            f'{TRAIN}.metainfo.classes',
            '0',
            r"classes = '0' is neither a file .* names; give a list",
        ),
        (f'{TRAIN}.metainfo.classes', 'missing.txt', 'neither a file nor a list'),
        (f'{TRAIN}.metainfo.classes', [0, 1], 'holds 0, which is not a name; .*=FILE a text file'),
        (f'{TRAIN}.metainfo.classes', (), 'names no classes'),
        (f'{TRAIN}.metainfo.classes', None, 'names no classes'),
        (f'{TRAIN}.metainfo.classes', {'0': 1}, 'names no classes'),
        (f'{TRAIN}.metainfo.classes', ('0', '0'), "holds '0' twice"),
        (f'{TRAIN}.metainfo', ('0', '1'), r'metainfo = .*: write dict\(classes'),
        (f'{TRAIN}.ann_file', 'train', 'is a folder'),
        (f'{TRAIN}.data_prefix', {}, r'data_prefix = .*: write dict\(img'),
        (
            f'{TRAIN}.data_prefix.img',
            'valid/',
            r"data_prefix.img = 'valid/': .*does not exist \(4 of the 4 images",
        ),
        ('val_dataloader.dataset.ann_file', 'more.json', 'val.json has no image with id 99'),
    ],
)
def test_what_does_not_fit_is_told(root, option, value, message):
    shutil.copy(root / 'val.json', root / 'more.json')
    change(root, lambda content: content['images'][0].update(id=99), 'more.json')
    change(root, lambda content: content.update(annotations=[]), 'more.json')
    cfg = config(root)
    parent, _, key = option.rpartition('.')
    place = cfg
    for part in parent.split('.'):
        place = place[part]
    place[key] = value.format(root=root) if isinstance(value, str) else value
    if message is None:
        check_coco(cfg)
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        check_coco(cfg)
    assert '\n' not in str(error.value)


def test_a_blank_line_in_a_file_of_classes_is_told(root, tmp_path):
    names = tmp_path / 'classes.txt'
    names.write_text('\n'.join(DIGITS) + '\n\n')
    with pytest.raises(ValueError, match="holds '', .*one name per line, and no other lines"):
        check_coco(config(root, **{f'{TRAIN}.metainfo.classes': str(names)}))


def change(root, edit, name='train.json'):
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


def without_masks(content):
    for entry in content['annotations']:
        del entry['segmentation']


def only_crowds(content):
    for entry in content['annotations']:
        entry['iscrowd'] = 1


def test_masks_are_needed_where_they_are_read_or_evaluated(root):
    change(root, without_masks)
    change(root, without_masks, 'val.json')
    cfg = config(root)
    with pytest.raises(ValueError, match="train.json: .*'segmentation' missing"):
        check_coco(cfg)
    with pytest.raises(ValueError, match="val.json: .*'segmentation' missing"):
        check_coco(cfg, ['test_dataloader'])
    for name in ('retinanet_r50', 'faster-rcnn_vits16'):
        check_coco(config(root, name))
    cfg = config(root, 'retinanet_r50', **{'val_evaluator.metric': ['bbox', 'segm']})
    with pytest.raises(ValueError, match="val.json: .*'segmentation' missing"):
        check_coco(cfg)


def test_nothing_to_learn_is_told(root):
    change(root, only_crowds)
    with pytest.raises(ValueError, match='train.json has no annotation of .* that counts'):
        check_coco(config(root))
    # Beside data with objects, images without are meant.
    cfg = config(root)
    more = cfg.train_dataloader.dataset
    full = cfg.val_dataloader.dataset | dict(pipeline=more.pipeline, test_mode=False)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[more, full])
    check_coco(cfg)
    change(root, lambda content: content.update(annotations=[]))
    check_coco(cfg)


def test_a_list_of_images_to_predict_needs_no_annotations(root):
    change(root, lambda content: content.pop('annotations'), 'val.json')
    cfg = config(root, **{'test_evaluator.format_only': True})
    check_coco(cfg, ['test_dataloader'])
    with pytest.raises(ValueError, match="val.json has no 'annotations'"):
        check_coco(cfg)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_images_of_another_size_are_told(root, split):
    file = next((root / split).glob('*'))
    Image.open(file).resize((48, 96)).save(file)
    message = f'{split}_dataloader.dataset: .*{file.name} is read as 48 x 96 pixels, but'
    with pytest.raises(ValueError, match=message):
        check_coco(config(root))


def test_an_image_that_is_missing_is_told(root):
    next((root / 'train').glob('*')).unlink()
    with pytest.raises(FileNotFoundError, match=r'does not exist \(1 of the 4 images'):
        check_coco(config(root))


@pytest.mark.parametrize(('file', 'said'), [('sub/a.png', r'sub\a.png'), ('a b.png', 'a%20b.png')])
def test_a_name_in_another_spelling_is_told(root, file, said):
    first = sorted((root / 'train').glob('*'))[0]
    (root / 'train' / 'sub').mkdir()
    first.rename(root / 'train' / file)

    def rename(content):
        next(i for i in content['images'] if i['file_name'] == first.name)['file_name'] = said

    change(root, rename, 'train.json')
    message = re.escape(f'in the file, write {file!r} for {said!r}')
    with pytest.raises(FileNotFoundError, match=message):
        check_coco(config(root))


@pytest.mark.parametrize(
    ('option', 'field'),
    [
        ('model.backbone.init_cfg.checkpoint', 'model.backbone.init_cfg.checkpoint'),
        ('load_from', 'load_from'),
    ],
)
def test_a_checkpoint_to_start_from_that_is_missing_is_told(root, tmp_path, option, field):
    start = tmp_path / 'start.pth'
    start.touch()
    start = {'model.backbone.init_cfg.checkpoint': str(start)}
    check_pretrained(config(root, **start))
    with pytest.raises(FileNotFoundError, match=rf"^{field} = 'none.pth' .*options {field}=FILE"):
        check_pretrained(config(root, **(start | {option: 'none.pth'})))
    check_pretrained(config(root, **(start | {option: 'https://a.b/c.pth'})))
    resumed = config(root, **(start | dict(load_from='none.pth', resume=True)))
    check_pretrained(resumed)  # which resuming tells


@pytest.mark.parametrize('name', ['vits16', 'r50'])
def test_the_checkpoint_that_a_shipped_config_names_can_be_made(name):
    with pytest.raises(FileNotFoundError, match=f'make it with ser-mm train ser_mocov3_{name}'):
        check_pretrained(load(f'retinanet_{name}'))
