"""Images in tar archives."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from mmengine import fileio

from ser_mm.datasets import ImageSource, LoadReadableImage
from ser_mm.datasets.image_source import check_images
from ser_mm.datasets.tar_shards import file_of, iterate_members, name_of
from tests.support.images import write_images


def pack(file, root, *names, kind=tarfile.PAX_FORMAT):
    """An archive of files below a folder, under their names there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, 'w', format=kind) as archive:
        for name in names:
            archive.add(root / name, name)
    return file


def listed(root, **options):
    """Labels by names, relative to the folder."""
    data = ImageSource(root, **options)
    found = [data.get_data_info(i) for i in range(len(data))]
    root = Path(root) if Path(root).is_dir() else Path(root).parent
    return {str(Path(name_of(x['img_path'])).relative_to(root)): x.get('gt_label') for x in found}


@pytest.fixture
def files(tmp_path):
    """Names of images, and the folder that they are in."""
    names = [
        'a/1.png',
        'a/2 é@x.png',
        'b/deep/3.JPG',
        'a/4.png',
        'b/5.png',
        'a/' + 120 * 'n' + '.png',
        'b/at 1.00\u202fPM\u3000\u00a0.png',  # spaces of macOS, of Japanese and others
    ]
    write_images(tmp_path / 'files', *names)
    return tmp_path / 'files', names


@pytest.mark.parametrize('kind', [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_where_they_are(files, tmp_path, kind):
    root, names = files
    shard = pack(tmp_path / 'x@y' / 'shard 0.tar', root, *names, kind=kind)
    assert listed(shard, with_label=True) == {
        f'shard 0.tar/{name}': int(name.startswith('b')) for name in names
    }
    data = ImageSource(shard, pipeline=[dict(type='LoadReadableImage')])
    before = sorted(tmp_path.rglob('*'))
    for i in (5, 0, 3):  # in any order
        info = data.get_data_info(i)
        assert fileio.get(info['img_path']) == (root / names[i]).read_bytes()
        expected = LoadReadableImage()(dict(img_path=str(root / names[i])))['img']
        np.testing.assert_array_equal(data[i]['img'], expected)
        assert file_of(info['img_path']) == str(shard)
    assert sorted(tmp_path.rglob('*')) == before  # nothing is unpacked


def test_shards_of_a_folder_with_and_without_classes(files, tmp_path):
    root, names = files
    shards = tmp_path / 'shards'
    pack(shards / 'x-0.tar', root, *names[:2])
    pack(shards / 'x-1.tar', root, *names[2:])
    expected = {f'x-{int(i > 1)}.tar/{n}': int(n[0] == 'b') for i, n in enumerate(names)}
    assert listed(shards, with_label=True) == expected
    assert set(listed(shards)) == set(expected)
    # As of ImageNet, an archive in the folder of each class; and two parts.
    write_images(tmp_path, '1.png', '2.png', '3.png')
    for number, place in enumerate(('train/a', 'train/b', 'val/a'), 1):
        pack(tmp_path / 'parts' / place / 'x.tar', tmp_path, f'{number}.png')
    assert listed(tmp_path / 'parts', with_label=True) == {
        'train/a/x.tar/1.png': 0,
        'train/b/x.tar/2.png': 1,
    }
    assert list(listed(tmp_path / 'parts', split='val')) == ['val/a/x.tar/3.png']
    # As of webdataset, without folders.
    (tmp_path / '1.json').write_text('{}')
    flat = pack(tmp_path / 'flat.tar', tmp_path, '1.json', '1.png', '2.png')
    assert list(listed(flat)) == ['flat.tar/1.png', 'flat.tar/2.png']
    with pytest.raises(ValueError, match='labels are needed'):
        ImageSource(flat, with_label=True)


def test_hard_links_are_images(files, tmp_path):
    """tar writes one file under a second name as a link to the first."""
    root, names = files
    os.link(root / names[0], root / 'b' / 'again.png')
    shard = pack(tmp_path / 'x.tar', root, *names, 'b/again.png')
    with tarfile.open(shard) as archive:
        assert archive.getmember('b/again.png').islnk()
    paths = {
        name_of(path).rpartition('/')[2]: path for path, _ in iterate_members(shard, ('.png',))
    }
    assert fileio.get(paths['again.png']) == fileio.get(paths['1.png'])


def test_archives_beside_images_are_no_images(files, tmp_path):
    """A backup, say; as it was before."""
    root, names = files
    pack(root / 'backup.tar', root, *names[:2])
    pack(root / 'more' / 'backup.tar', root, *names[:2])
    assert set(listed(root)) == set(names)


def test_members_that_are_not_images_are_passed_over(tmp_path):
    write_images(tmp_path, 'x.png')
    shard = tmp_path / 'x.tar'
    image = (tmp_path / 'x.png').read_bytes()
    with tarfile.open(shard, 'w') as archive:
        for name in (
            '../up.png', 'a/../../up.png', '.hidden/x.png', 'a/._x.png', 'a/x.txt', 'a/b\nc.png',
            './a/./fine.png', '/b/fine.png', 's3://c/fine.png',
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo('a/link.png')
            member.type, member.linkname = kind, '/etc/hostname'
            archive.addfile(member)
    found = listed(shard, with_label=True)
    assert found == {'x.tar/a/fine.png': 0, 'x.tar/b/fine.png': 1, 'x.tar/s3:/c/fine.png': 2}
    for path, _ in iterate_members(shard, ('.png',)):
        assert fileio.get(path) == image


def write_size(content, start, size):
    """As GNU tar writes what octal digits do not hold; and the sum of the header."""
    number = size.to_bytes(12, 'big', signed=True)
    content[start + 124 : start + 136] = bytes([number[0] | 128]) + number[1:]
    content[start + 148 : start + 156] = b' ' * 8
    content[start + 148 : start + 156] = b'%06o\0 ' % sum(content[start : start + 512])


def damage(name, shard):
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        headers = [member.offset for member in archive]
    if name == 'it ends in an image':
        del content[headers[1] + 600 :]
    elif name == 'it ends in the last image':
        del content[headers[2] + 600 :]
    elif name == 'a header is other bytes':
        content[headers[1] : headers[1] + 512] = np.random.default_rng(0).bytes(512)
    elif name == 'a header is zeros':
        content[headers[1] : headers[1] + 512] = bytes(512)
    elif name == 'two in one file':
        content += bytes(content)
    elif name == 'a size below 0':
        write_size(content, headers[1], -512)
    elif name == 'a size below 0 of what is no image':
        content[headers[1] : headers[1] + 5] = b'x.txt'
        write_size(content, headers[1], -512)
    elif name == 'a size beyond the disk':
        write_size(content, headers[1], 2**62)
    elif name == 'a long name beyond memory':
        content[headers[1] + 156] = ord('L')
        write_size(content, headers[1], 2**62)
    elif name == 'it is compressed':
        import gzip

        content = gzip.compress(bytes(content))
    elif name == 'it is empty':
        content = b''
    elif name == 'it is text':
        content = b'no archive\n' * 1000
    shard.write_bytes(content)


DAMAGES = [
    'it ends in an image',
    'it ends in the last image',
    'a header is other bytes',
    'a header is zeros',
    'two in one file',
    'a size below 0',
    'a size below 0 of what is no image',
    'a size beyond the disk',
    'a long name beyond memory',
    'it is compressed',
    'it is empty',
    'it is text',
]


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_shard_is_named_in_a_sentence(name, tmp_path):
    """tarfile itself says nothing of a header in the middle that it cannot read."""
    write_images(tmp_path, 'w.png', 'x.png', 'y.png')
    pack(tmp_path / 'shards' / '0.tar', tmp_path, 'w.png', 'x.png', 'y.png')
    names = 'w.png', 'x.png', 'y.png'
    shard = pack(tmp_path / 'shards' / '1.tar', tmp_path, *names, kind=tarfile.GNU_FORMAT)
    damage(name, shard)
    with pytest.raises(ValueError, match=r'1.tar is no whole tar .*; fetch it anew') as error:
        ImageSource(tmp_path / 'shards')
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match=r'1.tar is no whole tar'):
        check_images(shard)


def test_an_archive_is_listed_once_until_it_changes(files, tmp_path, monkeypatch):
    root, names = files
    shard = pack(tmp_path / 'x.tar', root, *names)
    calls = []
    opened = tarfile.open
    monkeypatch.setattr(tarfile, 'open', lambda *a, **k: calls.append(a) or opened(*a, **k))
    for _ in range(3):
        assert len(listed(shard)) == len(names)
    assert len(calls) == 1
    monkeypatch.undo()
    pack(shard, root, *names[:2])
    assert len(listed(shard)) == 2


def test_an_archive_that_became_shorter_is_an_unreadable_image(files, tmp_path):
    root, names = files
    shard = pack(tmp_path / 'x.tar', root, *names)
    paths = [path for path, _ in iterate_members(shard, ('.png',))]
    os.truncate(shard, 2048)
    with pytest.raises(OSError, match='x.tar ends before byte'):
        fileio.get(paths[-1])
    assert LoadReadableImage()(dict(img_path=paths[-1])) is None
