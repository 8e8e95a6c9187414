"""The end of a run that a signal stops: one line, no traceback, nothing left running."""

import ctypes
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Ctrl-C, a scheduler's end, a closed terminal; what schedulers can be asked to send before (Slurm
# by --signal=USR1@120); used up time.
_NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_PR_SET_PDEATHSIG = 1

COMMAND = 'SER_MM_COMMAND'
"""Variable by which the scripts that start several processes tell what the user typed."""

# What workers that read images are to forget when they are forked.
_taken: set[int] = set()
_masks: list[set[int]] = []


@contextmanager
def ending_on_signals(tell: Callable[[str], str]) -> Iterator[None]:
    """End this process and its children when a signal arrives, with exit status 128 + its number.

    A thread does so at once, also while the main one waits for another process or for a device. No
    checkpoint suffers, as they get their names when they are written. A second signal ends the
    process even if the thread cannot, as on a file system that hangs. Signals that something else
    handles, or that are ignored as under ``nohup``, stay as they are.

    Args:
        tell (Callable[[str], str]): From the name of the signal, the line to print; '' for none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: list[float] = []

    def take(number: int, _: object) -> None:
        now = time.monotonic()
        if first and now > first[0] + 0.5:
            os._exit(128 + number)
        first.append(now)

    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) in _DEFAULTS}
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    thread = threading.Thread(target=_wait, args=(source, set(before), tell), daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    _taken.update(before)
    for number in before:
        signal.signal(number, take)
    try:
        yield
    finally:
        _taken.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.write(sink, b'\0')
        thread.join()
        os.close(source)
        os.close(sink)


def _wait(source: int, numbers: set[int], tell: Callable[[str], str]) -> None:
    """End the process at one of some signals; torch, for one, handles others."""
    while number := os.read(source, 1)[0]:
        if number in numbers:
            _end(number, tell)


def _end(number: int, tell: Callable[[str], str]) -> None:
    name = signal.Signals(number).name
    try:
        try:
            line = tell(name)
        except Exception as error:  # as of a file system; there is no time for more
            line = f'Stopped by {name}. ({error})'
        if line:
            os.write(2, f'{line}\n'.encode())
        for child in multiprocessing.active_children():
            child.terminate()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(128 + number)


def _hold() -> None:
    """Let signals wait while a process is forked: its copy would tell this process of its own."""
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _taken))


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forget() -> None:
    """In a forked process, be ended by SIGTERM again, and leave the rest to its parent."""
    if _taken:
        signal.set_wakeup_fd(-1)
        for number in _taken:
            ended = number in (signal.SIGTERM, signal.SIGHUP)
            signal.signal(number, signal.SIG_DFL if ended else _ignore)
        _taken.clear()
    _go_on()


def _ignore(number: int, _: object) -> None:
    """Unlike SIG_IGN, forgotten by a program that is started from here."""


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_forget)


def end_with_parent() -> None:
    """Let Linux send this process SIGTERM when the one that started it ends, killed or not."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def command(launcher: str) -> str | None:
    """What the user typed to start this process, where it is known.

    Args:
        launcher (str): 'none' if the user started it, else what did.
    """
    if launcher != 'none':
        return os.environ.get(COMMAND, '').strip() or None
    return shlex.join(sys.orig_argv)
