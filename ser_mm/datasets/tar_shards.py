"""Images in tar archives, read where they are: nothing is unpacked to the disk."""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from mmengine.fileio import BaseStorageBackend, register_backend

_PART = 2**20
_CONTROL = re.compile(r'[\x00-\x1f\x7f-\x9f]')


def iterate_members(file: str | Path, suffixes: Sequence[str]) -> Iterator[tuple[str, tuple]]:
    """Images of a tar archive, in its order.

    The archive is read through once in a process, by the headers of its members, and again when it
    changes. Symbolic links, hidden files, and names that leave their folder or have control
    characters are passed over.

    Args:
        file (str | Path): An archive that is not compressed.
        suffixes (Sequence[str]): Of images, in lower case.

    Yields:
        tuple: A path that :class:`TarBackend` reads, ``tar://...@FILE/MEMBER``; and the
        parts of the member's name.

    Raises:
        ValueError: If it is no such archive, or is damaged.
    """
    file = os.path.abspath(file)
    found = os.stat(file)
    names, places = _index(file, tuple(suffixes), found.st_size, found.st_mtime_ns)
    for name, (offset, size) in zip(names.decode().split('\n'), places.tolist(), strict=False):
        yield f'tar://{offset}+{size}+{len(file)}@{file}/{name}', tuple(name.split('/'))


def file_of(path: str) -> str:
    """The archive that a path of :func:`iterate_members` is in, or the path itself of others."""
    return _split(path)[0] if is_member(path) else path


def name_of(path: str) -> str:
    """The name ``FILE/MEMBER`` in a path of :func:`iterate_members`, or the path itself."""
    return path.partition('@')[2] if is_member(path) else path


def is_member(path: str) -> bool:
    """Whether a path is one of :func:`iterate_members`."""
    return path.startswith('tar://')


def _split(path: str) -> tuple[str, int, int]:
    """The archive, and the offset and the size of a member in bytes."""
    place, _, name = path.removeprefix('tar://').partition('@')
    offset, size, length = map(int, place.split('+'))
    return name[:length], offset, size


@register_backend('tar', prefixes='tar')
class TarBackend(BaseStorageBackend):
    """Reads members of tar archives, for MMEngine's ``fileio.get`` and what loads images by it."""

    def get(self, filepath: str) -> bytes:
        """Read a member.

        Args:
            filepath (str): As of :func:`iterate_members`.

        Raises:
            OSError: If the archive is not there, or ends before.
        """
        file, offset, size = _split(str(filepath))
        with open(file, 'rb') as opened:
            opened.seek(offset)
            content = opened.read(size)
        if len(content) < size:
            raise OSError(f'{file} ends before byte {offset + size}')
        return content

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """Read a member as text."""
        return self.get(filepath).decode(encoding)


@lru_cache(maxsize=65536)
def _index(
    file: str, suffixes: tuple[str, ...], size: int, changed: int
) -> tuple[bytes, np.ndarray]:
    """Names, a line each, and offsets and sizes in bytes, (N, 2), of an archive's images."""
    found: list[tuple[str, tuple[int, int]]] = []
    links: list[tuple[str, str]] = []
    try:
        with tarfile.open(file, 'r:', errors='replace') as archive:
            start = -1
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # which would keep all
                # Sizes below 0 lead back, for ever in some releases of Python.
                if member.offset <= start:
                    raise tarfile.ReadError(f'a size below 0 leads back to byte {member.offset}')
                start = member.offset
                name = _plain(member.name)
                if not name.lower().endswith(suffixes) or member.issparse():
                    continue
                if member.islnk():  # to what came before
                    links.append((name, _plain(member.linkname)))
                elif member.isreg():
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f'{name} has a size of {member.size} bytes')
                    found.append((name, (member.offset_data, member.size)))
            end = archive.offset
        with open(file, 'rb') as opened:
            opened.seek(end)
            # For tarfile a header that cannot be read is the end, and so are zeros, be they a hole
            # or the end of the first of several archives in a file.
            while part := opened.read(_PART):
                if part.strip(b'\0'):
                    raise tarfile.ReadError(
                        f'it ends at byte {end}, and more follows, damaged or a second archive'
                    )
    except OSError:
        raise
    except Exception as error:  # tarfile raises many types on damaged headers
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f'{file} is no whole tar archive without compression ({why}); '
            'fetch it anew, decompress it, or leave it out.'
        ) from error
    if links:
        targets = dict(found)
        found += [(name, targets[target]) for name, target in links if target in targets]
    names = '\n'.join(name for name, _ in found).encode()
    return names, np.array([place for _, place in found], np.int64).reshape(-1, 2)


def _plain(name: str) -> str:
    """The name of a member without what says nothing; '' if it is hidden or leaves its folder."""
    parts = [part for part in name.split('/') if part not in ('', '.')]
    hidden = any(part.startswith('.') for part in parts) or _CONTROL.search(name)
    return '' if hidden else '/'.join(parts)
