"""Images kept in one file: those of the data set, written once, and anew when they change."""

import copy
import multiprocessing
import os
import pickle
import shutil
import tarfile
import time

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmpretrain.registry import DATASETS
from PIL import Image

from ser_mm.datasets import CachedImages
from ser_mm.engine.checks import check_data
from ser_mm.engine.images import use_images
from tests.support.small_images import OwnCIFAR, write_cifar

ONCE = [
    dict(type='LoadReadableImage'),
    dict(type='ResizeEdge', scale=32, backend='pillow'),
    dict(type='CenterCrop', crop_size=32),
]

# Otherwise MMEngine collects garbage for each data set, which takes most of the time here.
QUICK = dict(serialize_data=False)


@pytest.fixture
def photos(imagenet_tree, tmp_path):
    """16 images of 96 x 96, and one of another shape."""
    root = tmp_path / 'photos'
    shutil.copytree(imagenet_tree / 'train', root)
    Image.new('RGB', (90, 60), 'red').save(root / 'n00000003' / 'red.png')
    return root


def config(root, tmp_path, once=ONCE, **options):
    source = dict(type='ImageSource', data_root=str(root), with_label=True, pipeline=once, **QUICK)
    return dict(
        type='CachedImages',
        dataset=source,
        folder=str(tmp_path / 'kept'),
        pipeline=[dict(type='PackInputs')],
        **QUICK,
        **options,
    )


def build(*args, **options) -> CachedImages:
    return DATASETS.build(copy.deepcopy(config(*args, **options)))


def directly(root):
    """The same images by MMPretrain's own way, each time from the files."""
    source = config(root, root)['dataset']
    return DATASETS.build(dict(source, pipeline=[*ONCE, dict(type='PackInputs')]))


def check_same(data, expected):
    assert len(data) == len(expected) > 0
    for item, other in zip(data, expected, strict=True):
        assert torch.equal(item['inputs'], other['inputs'])
        assert item['data_samples'].gt_label == other['data_samples'].gt_label
        assert item['data_samples'].img_path == other['data_samples'].img_path


def test_images_and_labels_are_those_of_the_data_set(photos, tmp_path):
    data = build(photos, tmp_path)
    expected = directly(photos)
    check_same(data, expected)
    assert data.metainfo == expected.metainfo
    assert list(data.get_gt_labels()) == list(expected.get_gt_labels())
    batch = default_collate([data[i] for i in range(4)])
    assert batch['inputs'].shape == (4, 3, 32, 32) and batch['inputs'].dtype == torch.uint8
    part = build(photos, tmp_path, indices=[3, 5])
    assert torch.equal(part[1]['inputs'], data[5]['inputs'])


def test_it_is_written_once(photos, tmp_path):
    data = build(photos, tmp_path)
    assert list((tmp_path / 'kept').iterdir()) == [data.file]
    written = data.file.stat().st_mtime_ns
    again = build(photos, tmp_path)
    assert (again.file, again.file.stat().st_mtime_ns) == (data.file, written)
    check_same(again, directly(photos))
    # Other transforms are of another file, and nothing of the images is read into the process.
    other = build(photos, tmp_path, once=[*ONCE[:2], dict(type='CenterCrop', crop_size=16)])
    assert other.file != data.file and data.file.exists() and len(other[0]['inputs'][0]) == 16
    assert isinstance(data.rows, np.memmap)
    copied = pickle.loads(pickle.dumps(data))
    assert isinstance(copied.rows, np.memmap) and torch.equal(
        copied[2]['inputs'], data[2]['inputs']
    )
    assert len(pickle.dumps(data)) < 17 * 32 * 32 * 3


def changed(path):
    Image.new('RGB', (96, 96), 'blue').save(path)


@pytest.mark.parametrize('change', ['changed', 'added', 'removed', 'renamed'])
def test_a_changed_folder_is_noticed(change, photos, tmp_path):
    first = build(photos, tmp_path)
    path = sorted((photos / 'n00000001').iterdir())[1]
    if change == 'changed':
        changed(path)
    elif change == 'added':
        changed(path.with_name('a_new_one.JPEG'))
    elif change == 'removed':
        path.unlink()
    else:
        path.rename(path.with_name('zzz.JPEG'))
    second = build(photos, tmp_path)
    check_same(second, directly(photos))
    assert list((tmp_path / 'kept').iterdir()) == [second.file] and second.file != first.file


def test_another_archive_of_the_same_name_is_noticed(tmp_path):
    archive = tmp_path / 'photos.tar'
    for number, colour in enumerate(('red', 'blue')):
        with tarfile.open(archive, 'w') as tar:
            # Files without compression have one size, and so one place in the archive.
            Image.new('RGB', (32, 32), colour).save(tmp_path / 'a.bmp')
            tar.add(tmp_path / 'a.bmp', 'x/a.bmp')
        os.utime(archive, ns=(number, number))
        found = build(archive, tmp_path)[0]['inputs']
        assert found[:, 0, 0].tolist() == [255 * (c == colour) for c in ('blue', '', 'red')]


def test_names_that_are_not_utf_8(photos, tmp_path):
    path = sorted((photos / 'n00000001').iterdir())[1]
    os.rename(path, os.fsencode(path.parent) + b'/b\xe4r.JPEG')
    check_same(build(photos, tmp_path), directly(photos))


def test_unreadable_images_are_left_out(photos, tmp_path):
    bad = sorted((photos / 'n00000000').iterdir())
    bad[0].write_bytes(b'no image')
    data = build(photos, tmp_path)
    expected = [directly(photos)[i] for i in range(1, 17)]
    check_same(data, expected)


def test_an_interruption_leaves_nothing(photos, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(CachedImages, '_check', stop)
        build(photos, tmp_path)
    assert list((tmp_path / 'kept').iterdir()) == []
    check_same(build(photos, tmp_path), directly(photos))


def test_one_process_writes_and_the_others_wait(photos, tmp_path, monkeypatch):
    """Without a process group, whose collectives on GPUs would time out."""
    seen, check = tmp_path / 'seen', CachedImages._check

    def slow(self, *args):
        time.sleep(0.05)  # the others have begun by the end
        with open(seen, 'a') as file:
            file.write('.')
        check(self, *args)

    monkeypatch.setattr(CachedImages, '_check', slow)
    fork = multiprocessing.get_context('fork')
    processes = [fork.Process(target=build, args=(photos, tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(seen.read_text()) == 17
    data = build(photos, tmp_path)
    assert list((tmp_path / 'kept').iterdir()) == [data.file]
    check_same(data, directly(photos))


def test_what_cannot_be_kept_is_one_sentence(photos, tmp_path):
    with pytest.raises(
        ValueError, match='32 x 48 x 3 uint8 of .*red.png, but the first .* 32 x 32'
    ):
        build(photos, tmp_path, once=ONCE[:2])
    with pytest.raises(ValueError, match='96 x 96 x 3 float32 of '):
        build(photos, tmp_path, once=[dict(ONCE[0], to_float32=True)])
    with pytest.raises(ValueError, match="leaves no image in 'img'; begin .* move PackInputs"):
        build(photos, tmp_path, once=[*ONCE, dict(type='PackInputs')])
    for path in photos.rglob('*.*'):
        path.write_bytes(b'no image')
    with pytest.raises(ValueError, match='none of its images is readable'):
        build(photos, tmp_path)


def test_data_sets_of_arrays(tmp_path):
    for seed in range(2):
        write_cifar(tmp_path, seed=seed)
        source = dict(type=OwnCIFAR, data_root=str(tmp_path), pipeline=[], **QUICK)
        pack = [dict(type='PackInputs')]
        kept = CachedImages(source, pack, tmp_path / 'kept', **QUICK)
        plain = DATASETS.build(dict(source, pipeline=pack))
        assert len(kept) == len(plain) == 10 and kept.metainfo == plain.metainfo
        for item, other in zip(kept, plain, strict=True):
            assert torch.equal(item['inputs'], other['inputs'])
            assert item['data_samples'].gt_label == other['data_samples'].gt_label
    assert len(list((tmp_path / 'kept').iterdir())) == 1


def test_own_images_take_the_place_of_what_is_inside(photos, tmp_path):
    cached = config('/nowhere', tmp_path)
    cfg = Config(
        dict(
            model=dict(type='MoCoV3'),
            train_dataloader=dict(dataset=cached),
            evaluation=dict(train=cached, val=cached),
        )
    )
    with pytest.raises(FileNotFoundError, match=r'train_dataloader.dataset.dataset.data_root'):
        check_data(cfg)
    use_images(cfg, photos)
    check_data(cfg)
    for dataset in (cfg.train_dataloader.dataset, cfg.evaluation.train, cfg.evaluation.val):
        assert dataset.type == 'CachedImages' and dataset.pipeline == [dict(type='PackInputs')]
        assert dataset.dataset.data_root == str(photos) and len(dataset.dataset.pipeline) == 3
        assert len(DATASETS.build(dataset)) > 0
