"""Images in place of the data sets of a config, and labels counted from 0."""

import copy
import tarfile
from pathlib import Path

import pytest
from mmengine.config import Config
from mmpretrain.registry import DATASETS

from ser_mm.datasets import ImageSource
from ser_mm.engine.checks import check_data
from ser_mm.engine.configs import find_config, shipped_configs
from ser_mm.engine.images import check_class_labels, check_labels, use_images
from tests.support.images import write_images

OTHERS = (
    *('benchmarks', 'coco', 'demo/det', 'small_images'),
    *('tiny_imagenet/faster', 'tiny_imagenet/linear', 'tiny_imagenet/supervised'),
)
PRETRAINING = [name for name in shipped_configs() if not name.startswith(OTHERS)]


@pytest.fixture(scope='module')
def classes(tmp_path_factory):
    """Six images in each of two class folders."""
    root = tmp_path_factory.mktemp('classes')
    write_images(root, *(f'{name}/{i}.png' for name in 'ab' for i in range(6)))
    return root


def build(dataset):
    """A data set without its transforms; to serialize a few paths takes the most time."""
    return DATASETS.build(dict(dataset, pipeline=[], serialize_data=False))


def sizes(*datasets):
    return [len(build(dataset)) for dataset in datasets]


@pytest.mark.parametrize('name', PRETRAINING)
def test_every_shipped_config_takes_them(name, classes):
    cfg = Config.fromfile(find_config(name))
    before = cfg.train_dataloader.dataset.pipeline, cfg.evaluation.val.pipeline
    use_images(cfg, classes)
    assert (cfg.train_dataloader.dataset.pipeline, cfg.evaluation.val.pipeline) == before
    check_data(cfg)
    train, val = cfg.evaluation.train, cfg.evaluation.val
    assert sizes(cfg.train_dataloader.dataset, train, val) == [12, 10, 2]
    assert 'gt_label' not in build(cfg.train_dataloader.dataset).get_data_info(0)
    assert build(val).get_data_info(1)['gt_label'] == 1
    assert sizes(cfg.test_dataloader.dataset) == [12]


@pytest.mark.parametrize('name', ['mocov3_cifar100', 'ser_mocov3_stl10'])
def test_data_sets_that_hold_their_pixels_do_not(name, classes):
    cfg = Config.fromfile(find_config(name))
    with pytest.raises(ValueError, match=r'whose pipeline starts from pixels; take a config of'):
        use_images(cfg, classes)


def test_configs_that_inherit_mmpretrains_data_set_take_them(classes, tmp_path):
    file = tmp_path / 'own.py'
    file.write_text("_base_ = ['mmpretrain::mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k.py']")
    cfg = Config.fromfile(file)
    use_images(cfg, classes)
    check_data(cfg)
    assert sizes(cfg.train_dataloader.dataset) == [12]
    file.write_text("_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']")
    cfg = Config.fromfile(file)
    use_images(cfg, classes)
    assert sizes(cfg.train_dataloader.dataset, cfg.val_dataloader.dataset) == [10, 2]


def test_images_without_labels(classes, tmp_path):
    write_images(tmp_path, *(f'{i}.png' for i in range(3)))
    cfg = Config.fromfile(find_config('ser_mocov3_vits16'))
    use_images(cfg, tmp_path)
    assert not cfg.evaluation.val.with_label
    use_images(cfg, tmp_path, labels=False, splits=['val'])
    assert sizes(cfg.evaluation.val) == [3]
    with pytest.raises(ValueError, match='labels are needed'):
        use_images(cfg, tmp_path, labels=True)
    with pytest.raises(ValueError, match='labels are needed'):
        use_images(cfg, classes, tmp_path, labels=True)
    use_images(cfg, tmp_path, classes, labels=False)
    assert sizes(cfg.train_dataloader.dataset, cfg.evaluation.val) == [3, 12]


def classifier(dataset, num_classes=2):
    return Config(
        dict(
            model=dict(type='ImageClassifier', head=dict(num_classes=num_classes)),
            train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset)),
            val_dataloader=dict(dataset=dataset),
        )
    )


def test_a_classifier_trains_on_labels_and_is_validated_on_what_is_held_out(classes):
    cfg = classifier(dict(type='CustomDataset', data_root='x', pipeline=[]))
    use_images(cfg, str(classes))
    assert cfg.train_dataloader.dataset.type == 'RepeatDataset'
    train, val = cfg.train_dataloader.dataset.dataset, cfg.val_dataloader.dataset
    assert sizes(train, val) == [10, 2] and train.with_label


def test_what_cannot_be_replaced(classes):
    cfg = Config(dict(model={}, train_dataloader=dict(dataset=dict(type='MNIST'))))
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset is MNIST without one'):
        use_images(cfg, classes)
    cfg = Config(dict(default_scope='mmdet', model={}))
    with pytest.raises(ValueError, match='is for images without annotations'):
        use_images(cfg, classes)


@pytest.fixture
def annotated(tmp_path):
    """Makes the config of a data set whose file has the given labels."""

    def make(*labels, kind='CustomDataset', **options):
        file = tmp_path / f'{len(list(tmp_path.iterdir()))}.txt'
        file.write_text(''.join(f'{i}.png {label}\n' for i, label in enumerate(labels)))
        write_images(tmp_path, '0.png')
        if kind == 'ImageSource':
            return dict(type=kind, data_root=str(file), with_label=True)
        return dict(type=kind, data_root=str(tmp_path), ann_file=file.name, pipeline=[], **options)

    return make


@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageSource', 'ImageNet'])
def test_labels_counted_from_1(annotated, kind):
    with pytest.raises(ValueError) as error:
        check_labels({'evaluation.val': annotated(1, 2, 3, 3, kind=kind)})
    field = 'evaluation.val.data_root' if kind == 'ImageSource' else 'evaluation.val.ann_file'
    assert str(error.value).startswith(f'{field} = ')
    assert '.txt' in str(error.value)
    assert 'labels from 1 to 3 and none that is 0; count them from 0' in str(error.value)


def test_labels_that_are_counted_from_0(annotated):
    check_labels(dict(a=annotated(0, 1, 2)))
    check_labels(dict(a=annotated(3, 7)))  # a part of the classes
    check_labels(dict(a=annotated(0, 1, 2), b=annotated(1, 2)))  # no image of a class
    check_labels(dict(a=annotated(1)))
    check_labels(dict(a=dict(annotated(1, 2), with_label=False)))
    check_labels(dict(a=annotated(1, 2)), num_classes=3)


def test_one_class_in_lists(annotated):
    """Every answer was right."""
    lists = {x: annotated(0, 0, kind='ImageSource') for x in ('evaluation.train', 'evaluation.val')}
    with pytest.raises(ValueError, match=r'evaluation.train.data_root = .* has one class, 0, and'):
        check_labels(lists)


def test_labels_that_are_no_class(annotated):
    with pytest.raises(ValueError, match='labels from 1 to 3; count them from 0 to 2'):
        check_labels(dict(a=annotated(1, 2, 3)), num_classes=3)
    with pytest.raises(ValueError, match='labels from -1 to 1; count them from 0'):
        check_labels(dict(a=annotated(-1, 0, 1)))
    with pytest.raises(ValueError, match=r'a\.ann_file = .*: not enough values.*"PATH LABEL"'):
        check_labels(dict(a=dict(annotated(0), ann_file=_bare(annotated))))


def _bare(annotated):
    dataset = annotated(0)
    Path(dataset['data_root'], dataset['ann_file']).write_text('0.png\n')
    return dataset['ann_file']


def test_the_labels_of_a_classifier_fit_its_head(annotated):
    check_class_labels(classifier(annotated(0, 1)))
    with pytest.raises(ValueError, match=r'train_dataloader\.dataset\.dataset\.ann_file = .* 2; '):
        check_class_labels(classifier(annotated(1, 2)))
    cfg = Config.fromfile(find_config('mocov3_vits16'))
    cfg.train_dataloader.dataset = annotated(1, 2)
    check_class_labels(cfg)  # which pretraining does not look at


def test_class_folders_of_a_classifier_are_the_same(tmp_path):
    """Those of validation were numbered by themselves: accuracies were of other classes."""
    write_images(tmp_path, *(f'train/{x}/0.png' for x in 'abc'), *(f'val/{x}/0.png' for x in 'ac'))
    cfg = classifier(dict(type='CustomDataset', data_root='x', pipeline=[]), 3)
    use_images(cfg, str(tmp_path))
    with pytest.raises(ValueError, match='have different classes: b and 0 more are in one only'):
        check_class_labels(cfg)
    write_images(tmp_path, 'val/b/0.png')
    check_class_labels(cfg)


def test_a_way_out_of_a_link_is_followed(tmp_path):
    """By name alone it led to other images, beside the link."""
    write_images(tmp_path, 'here/data/a/1.png', 'there/data/b/1.png', 'there/deep/x.png')
    (tmp_path / 'here' / 'link').symlink_to(tmp_path / 'there' / 'deep')
    for named, expected in (('link/../data', 'there/data'), ('../here/data', 'here/data')):
        cfg = Config.fromfile(find_config('mocov3_vits16'))
        use_images(cfg, tmp_path / 'here' / named)
        found = cfg.train_dataloader.dataset.data_root
        assert found == str((tmp_path / expected).resolve())


def test_class_folders_in_archives_are_the_same(tmp_path):
    """Archives were passed over: the first class of validation was taken for that of training."""
    write_images(tmp_path, *(f'raw/{x}/0.png' for x in 'abc'))
    for name in ('train/a', 'train/b', 'train/c', 'val/b', 'val/c'):
        (tmp_path / 'own' / name).mkdir(parents=True)
        with tarfile.open(tmp_path / 'own' / name / 'x.tar', 'w') as archive:
            archive.add(tmp_path / 'raw' / name[-1] / '0.png', '0.png')
    with tarfile.open(tmp_path / 'all.tar', 'w') as archive:
        for x in 'abc':
            archive.add(tmp_path / 'raw' / x / '0.png', f'{x}/0.png')
    with tarfile.open(tmp_path / 'one.tar', 'w') as archive:
        archive.add(tmp_path / 'raw' / 'a' / '0.png', 'a/0.png')
    empty = classifier(dict(type='CustomDataset', data_root='x', pipeline=[]), 3)
    for train, val in ((tmp_path / 'own', None), (tmp_path / 'all.tar', tmp_path / 'own' / 'val')):
        cfg = copy.deepcopy(empty)
        use_images(cfg, str(train), val)
        with pytest.raises(ValueError, match='have different classes: a and 0 more are in one'):
            check_class_labels(cfg)
    cfg = copy.deepcopy(empty)
    use_images(cfg, str(tmp_path / 'one.tar'))
    with pytest.raises(ValueError, match='has one class, a, and two or more'):
        check_class_labels(cfg)


def test_image_source_in_a_config_is_checked(tmp_path):
    cfg = Config.fromfile(find_config('mocov3_vits16'))
    cfg.train_dataloader.dataset.update(type=ImageSource, data_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r'train_dataloader\.dataset\.data_root: .* no im'):
        check_data(cfg)
