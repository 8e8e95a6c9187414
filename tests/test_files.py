"""Files are whole or not there, damaged ones are told, and folders in use are kept."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from ser_mm import files
from ser_mm.datasets import write_bundled_digits, write_bundled_photos
from ser_mm.files import locked, read_kept, replacing, replacing_folder, write_text
from ser_mm.visualization import draw_curves
from tests.support.paths import ROOT


def start(code, *args):
    """A process that runs some code, and has printed its first line."""
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.first = process.stdout.readline().strip()
    return process


# `ser_mm.files` without the package, whose import takes seconds
LOAD = """
import importlib.util, os, subprocess, sys
spec = importlib.util.spec_from_file_location('files', 'ser_mm/files.py')
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""
WRITE = f"""{LOAD}
with files.replacing(sys.argv[1]) as part:
    part.write_text('half')
    print(part, flush=True)
    input()
"""
WRITE_FOLDER = f"""{LOAD}
with files.replacing_folder(sys.argv[1]) as part:
    (part / 'half.txt').write_text('half')
    print(part, flush=True)
    input()
"""
LOCK = f"""{LOAD}
with files.locked(sys.argv[1], 'work') as lock:
    child = subprocess.Popen(['sleep', sys.argv[2]], pass_fds=[lock], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    input()
"""


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / 'new' / 'a.json'
    write_text(file, 'first')
    with pytest.raises(UnicodeEncodeError):
        write_text(file, 'second\ud800')  # fails while it is written
    assert file.read_text() == 'first' and list(file.parent.iterdir()) == [file]
    with replacing(file) as part:
        part.write_text('third')
        assert part.suffix == '.json' and file.read_text() == 'first'
    assert file.read_text() == 'third' and list(file.parent.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_and_what_one_writes_is_not(tmp_path):
    killed, living = (start(WRITE, tmp_path / name) for name in ('a.npz', 'b.npz'))
    killed.kill()
    killed.wait()
    assert sorted(map(str, tmp_path.iterdir())) == sorted([killed.first, living.first])
    (tmp_path / '.mine.part.npz').write_text('not of this kind')
    write_text(tmp_path / 'c', 'text')
    assert {str(file) for file in tmp_path.iterdir()} == {
        living.first,
        str(tmp_path / 'c'),
        str(tmp_path / '.mine.part.npz'),
    }
    living.communicate('go on\n')
    assert living.returncode == 0 and (tmp_path / 'b.npz').read_text() == 'half'


def test_a_damaged_file_is_told_in_a_line_that_names_it(tmp_path, capsys):
    file = tmp_path / 'a'

    def read(path):
        return int(path.read_text())

    assert read_kept(file, read) is None and capsys.readouterr().out == ''
    file.write_text('3')
    assert read_kept(file, read) == 3
    file.write_text('three')
    assert read_kept(file, read) is None
    told = capsys.readouterr().out
    assert told.startswith(f'{file} cannot be read (ValueError: ') and told.count('\n') == 1


def test_a_lock_is_refused_while_its_process_lives(tmp_path):
    file = tmp_path / 'run.lock'
    process = start(LOCK, file, 0)
    with pytest.raises(
        BlockingIOError, match=rf'work is in use by process {process.pid} on .*kill'
    ):
        with locked(file, 'work'):
            pass
    process.communicate('go on\n')
    assert not file.exists()
    with locked(file, 'work'), locked(file, 'work'):
        assert file.read_text().startswith(f'{os.getpid()} ')
    assert not file.exists()


def test_a_lock_of_a_killed_process_waits_for_what_it_started(tmp_path):
    file = tmp_path / 'run.lock'
    process = start(LOCK, file, 60)
    process.kill()
    process.wait()
    child = int(process.first)
    other = start(
        f"""{LOAD}
print('waits', flush=True)
with files.locked(sys.argv[1], 'work'):
    print('free', flush=True)
""",
        file,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.5)
    os.kill(child, signal.SIGKILL)
    assert other.communicate(timeout=300)[0] == 'free\n' and other.returncode == 0


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    panels = {'loss': {'run': [(1, 0.5, 0.1), (2, 0.25, 0.1)]}}
    draw_curves(panels, tmp_path / 'curves', 'epoch')
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    assert file.name == 'curves.png' and before.startswith(b'\x89PNG')
    with pytest.raises(ValueError):
        draw_curves({'$\\frac{$': panels['loss']}, file, 'epoch')  # fails while it is drawn
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize('content', ['', '[]', '{"crop', '3'])
def test_data_with_a_damaged_stamp_is_refused_with_what_to_do(content, tmp_path):
    for name, write in {
        'bundled_photos.json': write_bundled_photos,
        'val.json': write_bundled_digits,
    }.items():
        (tmp_path / write.__name__).mkdir()
        (tmp_path / write.__name__ / name).write_text(content)
        with pytest.raises(FileExistsError, match='remove'):
            write(tmp_path / write.__name__)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = tmp_path / 'below' / 'folder'
    for text in ('old', 'new'):
        with replacing_folder(folder) as part:
            (part / f'{text}.txt').write_text(text)
            assert not (folder / f'{text}.txt').exists()
    assert [x.name for x in folder.iterdir()] == ['new.txt']
    monkeypatch.setattr(files, '_exchange', lambda one, other: False)  # another system
    rename = os.rename

    def fail_in_the_middle(source, target):
        if target == folder and '.part' in source.name and (source / 'late.txt').exists():
            raise OSError('no')
        rename(source, target)

    monkeypatch.setattr(os, 'rename', fail_in_the_middle)
    with pytest.raises(OSError, match='no'), replacing_folder(folder) as part:
        (part / 'late.txt').write_text('late')
    assert [x.name for x in folder.iterdir()] == ['new.txt']
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_has_its_name_at_any_moment(tmp_path, monkeypatch):
    """A kill between two renames left it under a hidden name."""
    folder = tmp_path / 'folder'
    with replacing_folder(folder) as part:
        (part / 'old.txt').write_text('old')
    with replacing_folder(tmp_path / 'other') as part:
        (part / 'other.txt').write_text('other')
    if not files._exchange(folder, tmp_path / 'other'):
        pytest.skip('this file system cannot exchange names')
    assert [x.name for x in folder.iterdir()] == ['other.txt']

    def moved(*_):
        raise AssertionError('there is a moment without it')

    monkeypatch.setattr(os, 'rename', moved)
    with replacing_folder(folder) as part:
        (part / 'new.txt').write_text('new')
    assert [x.name for x in folder.iterdir()] == ['new.txt']
    assert sorted(x.name for x in tmp_path.iterdir()) == ['folder', 'other']


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    """Where names cannot be exchanged: the next file written beside it removed all there was."""
    folder = tmp_path / 'folder'
    with replacing_folder(folder) as part:
        (part / 'old.txt').write_text('old')
    code = f"""{LOAD}
files._exchange = lambda one, other: False
rename = os.rename
def renaming(source, target):
    rename(source, target)
    os.kill(os.getpid(), 9)
os.rename = renaming
with files.replacing_folder(sys.argv[1]) as part:
    (part / 'new.txt').write_text('new')
    print('started', flush=True)
"""
    start(code, folder).wait()
    assert not folder.exists()
    write_text(tmp_path / 'figures.json', '{}')

    def fail():
        with replacing_folder(folder):
            raise OSError('no space left on device')

    for _ in range(2):
        with pytest.raises(OSError, match='no space'):
            fail()
        assert [x.name for x in folder.iterdir()] == ['old.txt']
    assert sorted(x.name for x in tmp_path.iterdir()) == ['figures.json', 'folder']


def test_hidden_folders_of_others_stay(tmp_path):
    mine = tmp_path / '.folder.of_last_year.old'
    mine.mkdir()
    for _ in range(2):
        with replacing_folder(tmp_path / 'folder') as part:
            (part / 'text').write_text('text')
    assert mine.is_dir()


def test_a_file_may_be_read_by_whom_others_may(tmp_path):
    """That of safetensors, which puts a new one in its place, was for its owner alone."""
    write_text(tmp_path / 'text', 'text')
    with replacing(tmp_path / 'weights.safetensors') as part:
        save_file(dict(a=torch.zeros(1)), part)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_folder_that_another_removes_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    opened = os.open

    def open_late(path, *args):
        if str(path).endswith('.part') and not held:
            held.append(path)
            os.rmdir(path)
        return opened(path, *args)

    held = []
    monkeypatch.setattr(os, 'open', open_late)
    with replacing_folder(tmp_path / 'folder') as part:
        (part / 'text').write_text('text')
    assert held and [x.name for x in (tmp_path / 'folder').iterdir()] == ['text']


def test_folders_that_a_killed_process_left_are_removed(tmp_path):
    killed, living = (start(WRITE_FOLDER, tmp_path / name) for name in 'ab')
    killed.kill()
    killed.wait()
    with replacing_folder(tmp_path / 'c') as part:
        (part / 'text').write_text('text')
    assert {str(x) for x in tmp_path.iterdir()} == {living.first, str(tmp_path / 'c')}
    living.communicate('go on\n')
    assert living.returncode == 0 and (tmp_path / 'b' / 'half.txt').read_text() == 'half'


def test_a_link_stays_a_link_to_what_is_written(tmp_path):
    disk = tmp_path / 'disk'
    for name in ('folder', 'file'):
        (tmp_path / name).symlink_to(disk / name)
    for text in ('first', 'second'):
        write_text(tmp_path / 'file', text)
        with replacing_folder(tmp_path / 'folder') as part:
            (part / text).write_text(text)
        assert (tmp_path / 'file').is_symlink() and (disk / 'file').read_text() == text
        assert (tmp_path / 'folder').is_symlink()
        assert [x.name for x in (disk / 'folder').iterdir()] == [text]
