"""Images as people have them: in folders, in a list in a text file, or in tar archives."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from mmengine.logging import print_log
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, checked, filled
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET
from ser_mm.datasets.tar_shards import iterate_members

SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
"""Of images, in lower or upper case."""

# Sub-folders that parts of a data set are in, each part by the names it may have.
_PARTS = dict(train=('train',), val=('val', 'valid', 'validation'), test=('test',))
_TAR = '.tar'
_ARCHIVES = ('.zip', '.gz', '.tgz', '.bz2', '.xz', '.7z', '.rar', '.zst')
_LABELLED = re.compile(r'(.*?)[\s,]+(-?\d+)')
_EVERY = 5  # the share of a class that is held out
_MOST_CLASSES = 10**6  # what is more is a date or an id
_LOOK = 100  # lines of a list whose files are looked for before the run


@DATASETS.register_module()
@checked(**CUSTOM_DATASET, ann_file=Literal[''], data_prefix=Literal[''])
class ImageSource(CustomDataset):
    """Images of a folder, of its sub-folders, or of a list.

    A folder is searched with its sub-folders, also behind links; hidden files are passed over. If
    its sub-folders are ``train`` and ``val`` (or ``valid``, ``validation``), the split takes one of
    them, and what is beside them is left out. The label of an image is the number of the first
    folder on its way, in alphabetical order of those that hold images.

    A list is a text file with a line ``PATH`` or ``PATH LABEL`` for each image. Paths are relative
    to its folder, labels count from 0.

    An archive ``.tar``, or a folder of such in place of images, is read where it is, see
    :mod:`ser_mm.datasets.tar_shards`. It counts as the folder that it is in: labels are those of
    folders around it or in it.

    Args:
        data_root (str | Path): The folder, the list or the archive.
        split (str): 'train', 'val', or 'all' for all images, whatever folders they are in. Defaults
            to 'train'.
        hold_out (bool): Where there is no folder of validation images, let 'val' be every fifth
            image of each class (without labels: of all), and 'train' the others; otherwise both
            are all images. Defaults to False.
        with_label (bool): Read the labels. Defaults to False.
        extensions (Sequence[str]): Of image files. Defaults to those of :data:`SUFFIXES`.
        **kwargs: Those of MMPretrain's ``CustomDataset``: pipeline, ...

    Raises:
        FileNotFoundError: If ``data_root`` or all of its images are missing.
        PermissionError: If ``data_root`` cannot be read.
        ValueError: If it is another kind of file, a line of the list cannot be understood, or
            labels are missing.
    """

    def __init__(
        self,
        data_root: Name | Path,
        split: Literal['train', 'val', 'all'] = 'train',
        hold_out: bool = False,
        with_label: bool = False,
        extensions: Annotated[Sequence[Name], filled] = SUFFIXES,
        **kwargs,
    ) -> None:
        self.split = split
        self.hold_out = hold_out
        super().__init__(
            data_root=os.path.expanduser(data_root),
            with_label=with_label,
            extensions=extensions,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """List the images of the split.

        Returns:
            list[dict]: ``img_path``, and ``gt_label`` with labels, of each.

        Raises:
            OSError: See the class.
            ValueError: See the class.
        """
        try:
            return self._list()
        except (OSError, ValueError) as error:
            raise type(error)(f'ImageSource: data_root={self.data_root!r}: {error}') from error

    def _list(self) -> list[dict]:
        root, divided = part_of(self.data_root, self.split, self.extensions)
        images = list(iterate_images(root, self.extensions, self.with_label, warn=True))
        if not images:
            check_images(self.data_root, self.split, self.extensions, self.with_label)
        data: list[dict] = [dict(img_path=path) for path, _ in images]
        if self.with_label:
            names = sorted({name for _, name in images if isinstance(name, str)})
            for info, (_, label) in zip(data, images, strict=True):
                info['gt_label'] = label
            if names:
                numbers = {name: number for number, name in enumerate(names)}
                for info in data:
                    info['gt_label'] = numbers[info['gt_label']]
            else:
                names = list(map(str, range(max(info['gt_label'] for info in data) + 1)))
            self._metainfo.setdefault('classes', tuple(names))
        if self.hold_out and self.split != 'all' and not divided:
            data = _deal(data, self.split == 'val')
            if not data:
                raise ValueError(
                    f'{root}: no class has a second image to hold out; take more images, or give '
                    'training and validation images in folders train and val.'
                )
        print_log(f'{self.split}: {len(data)} images of {root}', 'current')
        return data


def part_of(root: str | Path, split: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[Path, bool]:
    """The folder or list that a split's images are in.

    Args:
        root (str | Path): Folder or list.
        split (str): 'train', 'val' or 'all'.
        suffixes (Sequence[str]): Of images. Defaults to :data:`SUFFIXES`.

    Returns:
        tuple: ``root`` itself, or its sub-folder; and whether other images of ``root`` are there
        for the other split.

    Raises:
        FileNotFoundError: If ``root`` does not exist, or has validation images only and others
            are asked for.
        PermissionError: If ``root`` cannot be read.
    """
    root = Path(root).expanduser()
    if split == 'all' or not root.is_dir():
        return root, False
    folders: dict[str, list[Path]] = {}
    for entry in sorted(_scan(root)[0], key=lambda x: x.name, reverse=True):  # small letters first
        folders.setdefault(entry.name.lower(), []).append(Path(entry.path))
    found: dict[str, Path] = {}
    spare: list[Path] = []
    for part, names in _PARTS.items():
        if same := [x for name in names for x in folders.pop(name, [])]:
            found[part], *more = same
            spare += more
    both = {'train', 'val'} <= set(found)
    if not {'train', 'val'} & set(found):
        return root, False
    above = (os.path.realpath(root),)
    rest = [*spare, *(folder for some in folders.values() for folder in some)]
    others = sorted(x.name for x in rest if next(_walk(x, suffixes, above), None))
    # One class may be called train: then others are beside it. No two are called train and val.
    if others and not both:
        return root, False
    if others:
        print_log(
            f'{root} has the folders train and val; images of {", ".join(others)} beside them are '
            'left out.',
            'current',
            30,
        )
    if split == 'train' and 'train' not in found:
        raise FileNotFoundError(
            f'{root} has the folder {found["val"].name}, but no folder train beside it; give '
            'the images to train on.'
        )
    return found.get(split) or found['train'], both


def class_folders(place: Path, suffixes: Sequence[str] = SUFFIXES) -> set[str]:
    """Names of the folders of classes in ``place``, or in its archives; none if it is a list."""
    if place.is_dir():
        above = (os.path.realpath(place),)
        names = {x.name for x in _scan(place)[0] if next(_walk(x.path, suffixes, above), None)}
        if names or any(True for _ in _walk(place, suffixes)):
            return names
    elif place.suffix.lower() != _TAR:
        return set()
    ways = _iterate_ways(place, tuple(suffixes), warn=False)
    return {way[0] for _, way in ways if len(way) > 1}


def check_images(
    root: str | Path,
    split: str = 'train',
    suffixes: Sequence[str] = SUFFIXES,
    with_label: bool = False,
) -> None:
    """Check that a place has images, reading no more of it than it takes to find one.

    Args:
        root (str | Path): Folder or list.
        split (str): 'train', 'val' or 'all'. Defaults to 'train'.
        suffixes (Sequence[str]): Of images. Defaults to :data:`SUFFIXES`.
        with_label (bool): Whether labels are needed. Defaults to False.

    Raises:
        FileNotFoundError: If it, or all of its images, are missing.
        PermissionError: If it cannot be read.
        ValueError: If it is another kind of file, or labels are missing.
    """
    place, _ = part_of(root, split, suffixes)
    if next(iterate_images(place, suffixes, with_label), None):
        return
    if place.is_file() and place.suffix.lower() != _TAR:
        raise ValueError(f'{place} is empty; write the path of an image on each line.')
    if with_label and next(iterate_images(place, suffixes, False), None):
        raise ValueError(
            f'{place} has images, but no sub-folders of images: labels are needed. Make a folder '
            'for each class, or give a list with a line "PATH LABEL" for each image.'
        )
    if place.is_dir():
        _scan_all(place)
    raise FileNotFoundError(
        f'{place} has no images ({", ".join(sorted(suffixes))}); name a folder that has some, or '
        'a list of images.'
    )


def iterate_images(
    place: Path, suffixes: Sequence[str], with_label: bool, warn: bool = False
) -> Iterator[tuple[str, str | int | None]]:
    """Images of a folder or a list, with their class folders or numbers if labels are asked for.

    Args:
        place (Path): Folder or list.
        suffixes (Sequence[str]): Of images, in lower case.
        with_label (bool): Whether labels are needed.
        warn (bool): Log what is passed over. Defaults to False.

    Yields:
        tuple: Path, and the name of its class, its number in a list, or None without labels.

    Raises:
        FileNotFoundError: If the place does not exist, or the first files of a list do not.
        PermissionError: If it cannot be read.
        ValueError: If it is another kind of file, or a line of a list cannot be understood.
    """
    suffixes = tuple(suffixes)
    if not os.path.lexists(place):
        raise FileNotFoundError(
            f'{place} does not exist; give a folder of images, or a text file that lists them.'
        )
    if place.exists() and not (place.is_file() or place.is_dir()):  # a pipe, say: read once only
        raise ValueError(
            f'{place} is neither a folder nor a regular file; give a folder of images, or a text '
            'file that lists them.'
        )
    if place.is_file() and place.suffix.lower() != _TAR:
        yield from _read_list(place, suffixes, with_label)
        return
    loose = 0
    for path, way in _iterate_ways(place, suffixes, warn):
        if with_label and len(way) == 1:
            loose += 1
        else:
            yield path, way[0] if with_label else None
    if loose and warn:
        print_log(
            f'{place}: passed over {loose} images that are in no class folder, where labels are '
            'needed',
            'current',
            30,
        )


def _iterate_ways(
    place: Path, suffixes: tuple[str, ...], warn: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Images of a folder, or of its archives if it has none, with the folders on the way."""
    if place.is_file():
        yield from iterate_members(place, suffixes)
        return
    before = len(os.path.join(place, ''))
    path = None
    for path in _walk(place, suffixes, warn=warn):
        yield path, tuple(path[before:].split(os.sep))
    if path is None:
        for path in _walk(place, (_TAR,)):
            around = path[before:].split(os.sep)[:-1]
            yield from ((x, (*around, *way)) for x, way in iterate_members(path, suffixes))


def _read_list(
    path: Path, suffixes: tuple[str, ...], with_label: bool
) -> Iterator[tuple[str, int | None]]:
    kind = path.suffix.lower()
    if kind in suffixes:
        raise ValueError(f'{path} is an image; give the folder that it is in, or a list of images.')
    if kind in _ARCHIVES:
        raise ValueError(f'{path} is an archive; unpack it, and give the folder.')
    try:
        text = path.read_bytes().decode('utf-8-sig')
    except PermissionError as error:
        raise PermissionError(f'{path} cannot be read: permission denied.') from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f'{path} is neither a folder nor a text file that lists images, a path on each line.'
        ) from error
    images: list[tuple[str, int | None]] = []
    folder = '' if path.parent == Path() else str(path.parent)
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        label = None
        match = _LABELLED.fullmatch(line)
        if match and match[1].lower().endswith(suffixes):
            line, label = match[1], int(match[2])
            if label >= _MOST_CLASSES:
                raise ValueError(
                    f'{path}, line {number}: {label} is no number of a class, of which there would '
                    'be as many; number the classes from 0.'
                )
        elif not line.lower().endswith(suffixes):
            raise ValueError(
                f'{path}, line {number}: {line[:80]!r} is neither PATH nor PATH LABEL, with an '
                f'image ({", ".join(suffixes)}) and a whole number.'
            )
        if with_label and label is None:
            raise ValueError(
                f'{path}, line {number}: {line!r} has no label; add a number, counted from 0.'
            )
        if line.startswith(('~', './')) or '//' in line or '/./' in line:
            line = str(Path(line).expanduser())
        images.append((os.path.join(folder, line), label if with_label else None))
    if images and not any(os.path.exists(file) for file, _ in images[:_LOOK]):
        raise FileNotFoundError(
            f'{path}: {images[0][0]} and what follows it do not exist; paths in a list are '
            'relative to its folder.'
        )
    yield from images


def _deal(data: list[dict], held: bool) -> list[dict]:
    """The images held out, every fifth of each class, or the others."""
    classes: dict[int | None, list[int]] = {}
    for i, info in enumerate(data):
        classes.setdefault(info.get('gt_label'), []).append(i)
    # Of a small class the last one; the only image of a class is to be trained on.
    chosen = {
        i
        for members in classes.values()
        if len(members) > 1
        for i in members[min(_EVERY, len(members)) - 1 :: _EVERY]
    }
    return [info for i, info in enumerate(data) if (i in chosen) == held]


def _walk(
    folder: str | Path, suffixes: Sequence[str], above: tuple[str, ...] = (), warn: bool = False
) -> Iterator[str]:
    """Images below a folder in alphabetical order, without what is hidden."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    try:
        folders, files = _scan(folder)
    except PermissionError:
        if not above:
            raise
        if warn:
            print_log(f'Passed over a folder that cannot be read, {folder}', 'current', 30)
        return
    endings = tuple(suffixes)
    yield from (file.path for file in files if file.name.lower().endswith(endings))
    for entry in folders:
        yield from _walk(entry.path, suffixes, (*above, real), warn)


def _scan(folder: str | Path) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """Folders and files of a folder."""
    found: tuple[list[os.DirEntry], list[os.DirEntry]] = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith('.'):
                    continue
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself, or into a folder that cannot be read
                    is_folder = False
                found[not is_folder].append(entry)
    except PermissionError as error:
        raise PermissionError(
            f'{folder} cannot be read: permission denied; it needs permission to read and to '
            'search (chmod u+rx).'
        ) from error
    return found


def _scan_all(folder: str | Path) -> None:
    """Raise the first PermissionError below a folder without images, which explains them."""
    for entry in _scan(folder)[0]:
        if not entry.is_symlink():
            _scan_all(entry.path)
