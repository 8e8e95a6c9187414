"""Signals end a training in one line, with its status, and leave no process behind."""

import ctypes
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ser_mm.checkpoint import read_checkpoint
from ser_mm.cli._arguments import one_sentence
from ser_mm.cli._signals import ending_on_signals
from tests.support import short_run
from tests.support.paths import ROOT
from tests.support.ports import free_port

PATIENCE = 300  # seconds, many times what anything here takes on two cores


@pytest.fixture
def config(imagenet_tree, tmp_path):
    """A run that does not end by itself, with two processes that read images."""
    return short_run.write_config(tmp_path / 'run.py', imagenet_tree)


class Training:
    """A command of which every process, also one that was left by its parent, can be found."""

    def __init__(self, *command, **variables):
        self.mark = f'{os.getpid()}.{time.monotonic_ns()}'
        env = dict(os.environ, TEST_MARK=self.mark, PYTHONUNBUFFERED='1', **variables)
        env.setdefault('VIRTUAL_ENV', sys.prefix)
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def processes(self):
        found = {}
        for folder in Path('/proc').glob('[0-9]*'):
            with suppress(OSError):
                if f'TEST_MARK={self.mark}'.encode() in (folder / 'environ').read_bytes():
                    state = (folder / 'stat').read_text().rpartition(')')[2].split()[0]
                    if state != 'Z':
                        found[int(folder.name)] = (folder / 'environ').read_bytes()
        return found

    def wait_for(self, pattern):
        seen = []
        for line in self.process.stdout:
            seen.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError(''.join(seen))

    def end(self):
        """What was printed since, and the exit status, when all processes have ended."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.processes()
        return out, self.process.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def told(out):
    """What is printed beside lines of the log."""
    return [line for line in out.splitlines() if line and ' - mmengine - ' not in line]


COMMAND = (sys.executable, '-m', 'ser_mm.cli.train')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGUSR1'])
def test_one_line_and_the_status(name, config, tmp_path):
    number = getattr(signal, name)
    work_dir = tmp_path / 'with space'
    with Training(*COMMAND, config, '--work-dir', work_dir) as run:
        run.wait_for(r'Epoch\(train\) *\[2\]\[2/4\]')
        assert len(run.processes()) >= 3
        # To all, as Slurm and a terminal do.
        os.killpg(run.process.pid, number)
        out, status = run.end()
    assert status == 128 + number
    (line,) = told(out)
    checkpoint = re.search(r'Last checkpoint: (.*?epoch_\d+\.pth)\. ', line)[1]
    assert line.startswith(f'Stopped by {name}. ')
    read_checkpoint(checkpoint)
    typed = shlex.split(line.partition('Go on by: ')[2])
    assert typed[-1] == '--resume'
    if name != 'SIGUSR1':
        return
    with Training(*typed) as run:  # the advice
        run.wait_for(f'Resuming from {checkpoint}')
        run.wait_for(r'Epoch\(train\)')
        run.process.send_signal(number)
        out, status = run.end()
    assert status == 128 + number and len(told(out)) == 1


def two_ranks(config, work_dir):
    command = ('tools/dist_train.sh', config, '2', '--work-dir', work_dir)
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    return Training('bash', *command, PORT=str(free_port()), OMP_NUM_THREADS='1', PATH=path)


def ranks(run):
    """Processes of both ranks, first the ranks themselves, by their number."""
    found = {}
    for pid, environment in sorted(run.processes().items()):
        match = re.search(rb'\0RANK=(\d)', environment)
        if match:
            found.setdefault(int(match[1]), pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1', 'SIGKILL'])
def test_two_ranks_end_with_the_script_that_started_them(name, config, tmp_path):
    """SIGUSR1 and SIGKILL left both ranks at work; the others ended in two tracebacks."""
    number = getattr(signal, name)
    with two_ranks(config, tmp_path / 'run') as run:
        run.wait_for(r'Epoch\(train\) *\[2\]\[1/2\]')
        run.process.send_signal(number)
        out, status = run.end()
    assert status == (-9 if name == 'SIGKILL' else 128 + number)
    assert 'Traceback' not in out
    received = 'SIGTERM' if name == 'SIGKILL' else name
    (line,) = [line for line in out.splitlines() if line.startswith('Stopped by')]
    assert re.match(
        rf'Stopped by {received}\. Last checkpoint: .*epoch_\d+\.pth\. Go on by: ', line
    )
    assert line.endswith(f'tools/dist_train.sh {config} 2 --work-dir {tmp_path / "run"} --resume')


@pytest.mark.slow
def test_one_rank_that_is_killed_ends_the_other(config, tmp_path):
    with two_ranks(config, tmp_path / 'run') as run:
        run.wait_for(r'Epoch\(train\) *\[2\]\[1/2\]')
        os.kill(ranks(run)[1], signal.SIGKILL)
        out, status = run.end()
    assert 'error: rank 1 was ended by SIGKILL.' in out and status == 128 + signal.SIGKILL


def forked(act, *signals, tell='Stopped by {}'.format):
    """Exit status and output of a process that ``act`` keeps busy when the signals arrive."""
    ready, busy = os.pipe()
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(sink, 2)
        with ending_on_signals(tell):
            os.write(busy, b'.')
            act()
        os._exit(0)
    for end in (busy, sink):
        os.close(end)
    os.read(ready, 1)
    for number in signals:
        time.sleep(0.7)
        os.kill(child, number)
    _, status = os.waitpid(child, 0)
    out = os.read(source, 1000).decode()
    for end in (ready, source):
        os.close(end)
    return os.waitstatus_to_exitcode(status), out


def sleep():
    while True:
        time.sleep(1)


def wait_for_a_mutex():
    """In C, where no signal is noticed, as in a collective operation whose peer is gone."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def hang(name):
    time.sleep(100)


def fail(name):
    raise RuntimeError


def test_a_process_that_waits_elsewhere_ends_too():
    assert forked(wait_for_a_mutex, signal.SIGTERM) == (143, 'Stopped by SIGTERM\n')


def test_a_second_signal_ends_at_once():
    # Twice: where the first is handled late, the next is too soon after it, and taken for the same.
    again = [signal.SIGINT] * 2
    assert forked(sleep, signal.SIGTERM, *again, tell=hang) == (130, '')


def test_whatever_fails_on_the_way_the_process_ends():
    status, out = forked(sleep, signal.SIGTERM, tell=fail)
    assert status == 143 and 'Stopped by SIGTERM.' in out


def test_what_is_ignored_or_handled_stays_so():
    def ignore_and_be_called():
        called.append(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(7 if called == [True, signal.SIGUSR2] else 1)

    called = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    other = signal.signal(signal.SIGUSR2, lambda number, _: called.append(number))
    try:
        assert forked(ignore_and_be_called) == (7, '')
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGUSR2, other)


def test_processes_started_meanwhile_can_be_ended_and_signals_are_given_back():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ending_on_signals(hang):
        child = multiprocessing.get_context('fork').Process(target=sleep)
        child.start()
        os.kill(child.pid, signal.SIGINT)  # to all of a terminal; ended by its parent
        child.join(0.3)
        assert child.exitcode is None
        child.terminate()
        child.join()
    assert child.exitcode == -signal.SIGTERM
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_an_interrupted_command_has_the_status_of_sigint(capsys):
    """It had that of an error."""
    with pytest.raises(SystemExit) as ended, one_sentence(interrupted='Interrupted; go on.'):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == 'Interrupted; go on.\n'
