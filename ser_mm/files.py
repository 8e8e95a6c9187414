"""Files that are written whole or not at all, that may be damaged, or that are in use."""

import ctypes
import hashlib
import os
import re
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ImportError:  # not a Unix: nothing is locked
    fcntl = None  # type: ignore[assignment]

T = TypeVar('T')

_PART = re.compile(r'\..*\.[0-9a-f]{32}\.part(\.\w+)?')
_PATIENCE = 30.0
"""Seconds until the processes of one that was killed have ended."""

# Locks that this process holds, by their file.
_held: dict[Path, int] = {}


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all, so that no reader and no interruption finds half of it.

    What was written gets the name of the file at the end of the context, if that ends without an
    error. What killed processes left in the folder is removed.

    Args:
        file (str | Path): File to write, or a link to it; its folder is made if it is not there.

    Yields:
        Path: Where to write, in the same folder and with the same suffix.
    """
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_parts(file.parent)
    part = file.with_name(f'.{file.stem}.{uuid.uuid4().hex}.part{file.suffix}')
    lock = _lock(part, wait=True)
    try:
        yield part
        with open(part, 'rb') as written:
            os.fsync(written.fileno())
        # What writes may have put another file there, that only its owner may read.
        os.chmod(part, stat.S_IMODE(os.fstat(lock).st_mode))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder whole or not at all.

    What was written gets the name of the folder at the end of the context, if that ends without an
    error, and what had that name before is removed. Where the file system can exchange two names,
    as those of Linux do, a folder has that name at any moment. What killed processes left is
    removed.

    Args:
        folder (str | Path): Folder to write, or a link to it; the one that it is in is made if it
            is not there.

    Yields:
        Path: Where to write, an empty folder beside it.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_parts(folder.parent)
    own = re.compile(rf'\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.old')
    for left in [x for x in folder.parent.iterdir() if own.fullmatch(x.name)]:
        if folder.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:  # of a process that was killed between two renames
            os.rename(left, folder)
    part, old = (
        folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}.{kind}') for kind in ('part', 'old')
    )
    lock = _lock(part, wait=True, is_folder=True)
    try:
        yield part
        for file in part.iterdir():
            with open(file, 'rb') as written:
                os.fsync(written.fileno())
        if not (folder.exists() and _exchange(part, folder)):
            if folder.exists():
                os.rename(folder, old)
            try:
                os.rename(part, folder)
            except BaseException:
                if old.exists():
                    os.rename(old, folder)
                raise
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names at once, if system and file system can."""
    rename = getattr(ctypes.CDLL(None), 'renameat2', None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if rename is None:
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def write_text(file: str | Path, text: str) -> None:
    """Write a text file, see :func:`replacing`.

    Args:
        file (str | Path): File to write; its folder is made if it is not there.
        text (str): Its content.
    """
    with replacing(file) as part:
        part.write_text(text)


def digest_file(file: str | Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal.

    Args:
        file (str | Path): File to read.
    """
    return hashlib.sha256(Path(file).expanduser().read_bytes()).hexdigest()


def read_kept(file: str | Path, read: Callable[[Path], T]) -> T | None:
    """Read what was kept to save work, if it is there and as it was written.

    Args:
        file (str | Path): File to read.
        read (Callable): Reads it; raises an error if its content is not what it should be.

    Returns:
        Any: What ``read`` returned. None if there is no file, or if it cannot be read, which
        is told in a line that names it; the caller makes it again.
    """
    try:
        return read(Path(file))
    except FileNotFoundError:
        return None
    except Exception as error:  # of many types, by where a file breaks off
        reason = (str(error).splitlines() or [''])[0]
        print(f'{file} cannot be read ({type(error).__name__}: {reason}); it is made again.')
        return None


@contextmanager
def locked(file: str | Path, what: str, wait: bool = False) -> Iterator[int]:
    """Hold a lock, until the end of the context or of this process, however it ends.

    The lock is with this process and those that inherit it: the ones that it forks, and the ones
    that it passes the descriptor to. After a kill it is free when all of these have ended, which
    the next one waits for. In a process that holds it already the context does nothing.

    Args:
        file (str | Path): File of the lock, there as long as it is held.
        what (str): What is locked, and begins the sentence of the error.
        wait (bool): Whether to wait, however long, for a living process that holds it. Defaults
            to False.

    Yields:
        int: Descriptor of the lock.

    Raises:
        BlockingIOError: If a living process holds it, but with ``wait``.
    """
    file = Path(os.path.abspath(file))
    if file in _held:
        yield _held[file]
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    while True:
        try:
            lock = _lock(file)
            break
        except BlockingIOError as error:
            pid, host = _owner(file)
            if wait:
                print(f'Waiting for {what}, which process {pid} on {host} uses.', flush=True)
                lock = _lock(file, wait=True)
                break
            is_ending = host == '?' or (host == socket.gethostname() and not _is_alive(pid))
            if not is_ending:
                raise BlockingIOError(
                    f'{what} is in use by process {pid} on {host}; let it finish, end it with '
                    f'`kill {pid}`, or choose another folder.'
                ) from error
            if time.monotonic() - start > _PATIENCE:
                raise BlockingIOError(
                    f'{what} is in use by what process {pid} has left; end what `fuser {file}` '
                    'lists, or choose another folder.'
                ) from error
            time.sleep(0.1)
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f'{os.getpid()} {socket.gethostname()}'.encode())
        _held[file] = lock
        yield lock
    finally:
        _held.pop(file, None)
        file.unlink(missing_ok=True)
        os.close(lock)


def _lock(file: Path, wait: bool = False, is_folder: bool = False) -> int:
    """A descriptor of a locked file, made if it is not there; BlockingIOError if it is taken."""
    while True:
        if is_folder:
            file.mkdir(exist_ok=True)
        try:
            lock = os.open(file, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another takes the folder for one that was left
            if not is_folder:
                raise
            continue
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(lock)
            raise
        except OSError:  # this file system has no locks
            return lock
        with suppress(FileNotFoundError):  # who had the lock before may have removed the file
            if os.path.samestat(os.fstat(lock), os.stat(file)):
                return lock
        os.close(lock)


def _owner(file: Path) -> tuple[int, str]:
    """Process and machine that hold a lock; 0 and '?' if that is not written yet."""
    with suppress(OSError, ValueError):
        pid, host = file.read_text().split()
        return int(pid), host
    return 0, '?'


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _remove_left_parts(folder: Path) -> None:
    """Remove files and folders that no process is writing any more."""
    for entry in os.scandir(folder):
        if not fcntl or not _PART.fullmatch(entry.name):
            continue
        with suppress(OSError):  # another removes it, or it is being written
            is_folder = entry.is_dir(follow_symlinks=False)
            lock = os.open(entry.path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (shutil.rmtree if is_folder else os.unlink)(entry.path)
            finally:
                os.close(lock)
