"""Images as people have them: folders of any shape, and lists."""

import os
from pathlib import Path

import pytest

from ser_mm.datasets import ImageSource, image_source
from ser_mm.datasets.image_source import check_images
from tests.support.images import write_images
from tests.support.unprivileged import unprivileged


def names(root, *args, **kwargs):
    """Paths, or paths and labels, of a data set, relative to its root."""
    data = ImageSource(root, *args, **kwargs)
    found = [data.get_data_info(i) for i in range(len(data))]
    root = Path(root) if Path(root).is_dir() else Path(root).parent
    paths = [str(Path(info['img_path']).relative_to(root)) for info in found]
    return dict(zip(paths, (info.get('gt_label') for info in found), strict=True))


def test_flat_folder(tmp_path):
    write_images(tmp_path, 'b 1.PNG', 'a,2.JpEg', '3', '.hidden.png', '.thumbs/x.png', 'c.webp')
    (tmp_path / 'notes.txt').write_text('')
    assert list(names(tmp_path)) == ['a,2.JpEg', 'b 1.PNG', 'c.webp']
    assert list(names(tmp_path, split='val')) == list(names(tmp_path))


def test_nested_and_class_folders(tmp_path):
    write_images(tmp_path, 'b/x/1.png', 'a b/2.png', 'a b/y/z/1.png', 'loose.png')
    (tmp_path / '.ipynb_checkpoints').mkdir()
    (tmp_path / 'aa empty').mkdir()
    assert set(names(tmp_path)) == {'b/x/1.png', 'a b/2.png', 'a b/y/z/1.png', 'loose.png'}
    labels = names(tmp_path, with_label=True)
    assert labels == {'a b/2.png': 0, 'a b/y/z/1.png': 0, 'b/x/1.png': 1}
    assert ImageSource(tmp_path, with_label=True).metainfo['classes'] == ('a b', 'b')


@pytest.mark.parametrize('val', ['val', 'valid', 'Validation'])
def test_folders_of_the_splits(tmp_path, val):
    write_images(tmp_path, 'train/a/1.png', 'train/b/2.png', f'{val}/a/3.png', 'test/4.png')
    (tmp_path / 'meta').mkdir()
    assert names(tmp_path, with_label=True) == {'train/a/1.png': 0, 'train/b/2.png': 1}
    for hold_out in (False, True):
        assert list(names(tmp_path, split='val', hold_out=hold_out)) == [f'{val}/a/3.png']


def test_all_images_whatever_folders_they_are_in(tmp_path):
    files = ['train/a/1.png', 'train/a/2.png', 'val/a/3.png', 'test/4.png']
    write_images(tmp_path, *files)
    for hold_out in (False, True):
        assert set(names(tmp_path, split='all', hold_out=hold_out)) == set(files)


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, 'car/1.png', 'train/1.png')
    assert names(tmp_path, with_label=True) == {'car/1.png': 0, 'train/1.png': 1}


def test_every_fifth_of_each_class_is_held_out(tmp_path):
    files = [f'a/{i:02}.png' for i in range(11)] + ['b/0.png', 'b/1.png', 'c/0.png']
    write_images(tmp_path, *files)
    options = dict(hold_out=True, with_label=True)
    held = names(tmp_path, split='val', **options)
    assert held == {'a/04.png': 0, 'a/09.png': 0, 'b/1.png': 1}
    rest = names(tmp_path, split='train', **options)
    assert held.keys() | rest.keys() == set(files) and not held.keys() & rest.keys()
    assert rest['c/0.png'] == 2  # the only one of its class is to be trained on
    one = write_images(tmp_path / 'one', 'c/0.png')[0].parents[1]
    with pytest.raises(ValueError, match='no class has a second image to hold out'):
        ImageSource(one, 'val', **options)


def test_lists(tmp_path):
    (outside,) = write_images(tmp_path / 'elsewhere', 'd 5.JPG')
    write_images(tmp_path, 'x/a b.png', 'c,3.png')
    plain = tmp_path / 'plain.txt'
    plain.write_text(f'x/a b.png\r\n\r\nc,3.png\n{outside}\n', encoding='utf-8-sig')
    assert list(names(plain)) == ['x/a b.png', 'c,3.png', 'elsewhere/d 5.JPG']
    labelled = tmp_path / 'labelled'
    labelled.write_text('x/a b.png 2\nc,3.png,0\nelsewhere/d 5.JPG\t2')
    wanted = {'x/a b.png': 2, 'c,3.png': 0, 'elsewhere/d 5.JPG': 2}
    assert names(labelled, with_label=True) == wanted
    assert ImageSource(labelled, with_label=True).metainfo['classes'] == ('0', '1', '2')
    assert set(names(labelled).values()) == {None}


def test_links(tmp_path):
    photos, data = tmp_path / 'photos', tmp_path / 'data'
    write_images(photos, 'x/1.png')
    data.mkdir()
    (data / 'a').symlink_to(photos / 'x')
    (data / 'b').symlink_to(photos / 'x')  # linked twice is there twice
    (photos / 'x' / 'round').symlink_to(photos)
    assert names(data, with_label=True) == {'a/1.png': 0, 'b/1.png': 1}


def test_what_lies_beside_train_and_val_is_left_out(tmp_path):
    """It made classes called train and val, and validation images were trained on."""
    write_images(tmp_path, 'train/cat/1.png', 'val/cat/2.png', 'figures/logo.png')
    assert list(names(tmp_path)) == ['train/cat/1.png']
    assert list(names(tmp_path, split='val')) == ['val/cat/2.png']
    write_images(tmp_path / 'one', 'train/1.png', 'car/2.png')
    assert names(tmp_path / 'one', with_label=True) == {'car/2.png': 0, 'train/1.png': 1}


def test_of_two_folders_of_one_part_the_first_counts(tmp_path, monkeypatch):
    """The last did, and nothing was said of the other."""
    told = []
    monkeypatch.setattr(image_source, 'print_log', lambda x, *_: told.append(x))
    parts = ('train/1.png', 'TRAIN/2.png', 'val/3.png', 'validation/4.png', 'test/5.png')
    write_images(tmp_path, *parts)
    assert list(names(tmp_path)) == ['train/1.png']
    assert list(names(tmp_path, split='val')) == ['val/3.png']
    assert 'images of TRAIN, validation beside them are left out' in told[0]


def test_a_link_to_itself_is_passed_over(tmp_path):
    write_images(tmp_path, 'a/1.png')
    (tmp_path / 'a' / 'self').symlink_to('self')
    assert list(names(tmp_path)) == ['a/1.png']


def refusals(tmp_path):
    write_images(tmp_path, 'flat/1.png', 'valonly/val/1.png')
    (tmp_path / 'empty').mkdir()
    texts = {
        'none.txt': '',
        'header.csv': 'path,label\n1.png,0\n',
        'half.txt': 'flat/1.png 0\nflat/1.png\n',
        'gone.txt': 'gone/1.png 0\ngone/2.png 0\n',
        'word.txt': 'flat/1.png cat\n',
        'date.txt': 'flat/1.png 20240105\n',
        'a.zip': 'PK',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
    os.mkfifo(tmp_path / 'pipe')
    return {
        'nowhere': 'does not exist; give a folder of images, or a text file',
        'empty': 'has no images (.bmp, ',
        'flat': 'has images, but no sub-folders of images: labels are needed',
        'flat/1.png': 'is an image; give the folder',
        'valonly': 'has the folder val, but no folder train beside it',
        'none.txt': 'is empty; write the path',
        'header.csv': "line 1: 'path,label' is neither PATH nor PATH LABEL",
        'half.txt': "line 2: 'flat/1.png' has no label; add a number, counted from 0",
        'gone.txt': 'gone/1.png and what follows it do not exist; paths in a list are relative',
        'word.txt': "line 1: 'flat/1.png cat' is neither",
        'date.txt': 'line 1: 20240105 is no number of a class',
        'a.zip': 'is an archive; unpack it',
        'binary': 'is neither a folder nor a text file that lists images',
        'pipe': 'is neither a folder nor a regular file; give a folder',
    }


def test_what_is_neither_a_folder_of_images_nor_a_list(tmp_path):
    for name, message in refusals(tmp_path).items():
        for look in (check_images, ImageSource):
            with pytest.raises((OSError, ValueError)) as error:
                look(tmp_path / name, with_label=True)
            assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('closed', ['.', 'sub', 'list.txt'])
def test_no_permission_is_said(closed):
    with unprivileged() as folder:
        write_images(folder, 'sub/1.png')
        (folder / 'list.txt').write_text('sub/1.png')
        os.chmod(folder / closed, 0)
        place = folder / closed if closed == 'list.txt' else folder
        for look in (check_images, ImageSource):
            with pytest.raises(PermissionError, match='cannot be read: permission denied'):
                look(place)


def test_a_closed_folder_beside_images_is_passed_over():
    with unprivileged() as folder:
        write_images(folder, 'train/1.png', 'val/2.png')
        (folder / 'lost+found').mkdir(mode=0)
        assert list(names(folder)) == ['train/1.png']
