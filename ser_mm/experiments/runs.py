"""Training runs as processes of ``ser-mm train``: several at a time, resumed and watched."""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmpretrain.registry import DATASETS
from torch.distributed.elastic.utils.distributed import get_free_port

from ser_mm.engine.cpu import count_cores
from ser_mm.engine.logs import read_scalars
from ser_mm.engine.options import read_fields
from ser_mm.files import locked, write_text
from ser_mm.progress import SECONDS

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package, a checkout or where packages are installed."""

_PR_SET_PDEATHSIG = 1
# Seconds that runs have to end; torchrun gives its processes 30.
_PATIENCE = 60


class RunError(RuntimeError):
    """A training run ended before its time."""


def finished(cfg: Config) -> str | None:
    """Path of the final checkpoint, if the run has come to its end.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Returns:
        str | None: None also if the checkpoint is not there any more, or cut off.
    """
    # MMEngine writes this file when the checkpoint that it names is complete.
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    final = Path(cfg.work_dir, f'epoch_{cfg.train_cfg.max_epochs}.pth')
    named = pointer.read_text(errors='replace') if pointer.is_file() else ''
    # A checkpoint is a zip file, and these end with their table of contents.
    return str(final) if Path(named).name == final.name and zipfile.is_zipfile(final) else None


def final_checkpoint(cfg: Config) -> str:
    """Path of the final checkpoint of a run that has ended.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Raises:
        RunError: If there is none. What takes None for it would go on with random weights.
    """
    found = finished(cfg)
    if found is None:
        raise RunError(
            f'{cfg.work_dir} has no epoch_{cfg.train_cfg.max_epochs}.pth, though its run has '
            'ended; let default_hooks.checkpoint keep that of the last epoch there.'
        )
    return found


def set_processes(runs: Iterable[Config], processes: int | None) -> None:
    """Let the settings of runs tell how many processes share a step, where it is more than one.

    ``train_dataloader.batch_size`` is that of one, so they make other batches of the same config.

    Args:
        runs (Iterable[Config]): Configs, changed in place.
        processes (int, optional): Of each run. None for one.
    """
    if (processes or 1) > 1:
        for cfg in runs:
            cfg.inputs = dict(cfg.get('inputs', {}), processes=processes)


def check_settings(cfg: Config) -> None:
    """Check that the folder of a run is new, or holds this run.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Raises:
        ValueError: If the folder holds a run with other settings, or one whose settings cannot be
            read.
    """
    config = Path(f'{cfg.work_dir}.py')
    if not config.exists():
        return
    try:
        kept = _settings(config.read_text())
    except Exception as error:  # it is Python
        raise ValueError(
            f'{config}, the settings of the run in {cfg.work_dir}, cannot be read '
            f'({type(error).__name__}: {error}); remove this file if they are the same as now, '
            'or else choose another --work-dir.'
        ) from error
    now = _settings(cfg.pretty_text)
    # Earlier versions of `ser-mm pretrain` wrote variables too, which nothing reads.
    read = {*now, 'inputs', *read_fields(cfg)}
    if {k: v for k, v in kept.items() if k in read} != now:
        raise ValueError(
            f'{cfg.work_dir} holds a run with other settings ({config}); remove it or choose '
            'another --work-dir.'
        )


@contextmanager
def reserved(runs: Iterable[Config]) -> Iterator[dict[str, int]]:
    """Keep other processes from the folders of runs, see :func:`~ser_mm.files.locked`.

    Args:
        runs (Iterable[Config]): Configs with ``work_dir``.

    Yields:
        dict[str, int]: Descriptors of the locks, by folder.

    Raises:
        BlockingIOError: If another process trains or evaluates one of them.
    """
    with ExitStack() as locks:
        # In one order, so that of two that start at the same time one gets all.
        folders = sorted({cfg.work_dir for cfg in runs})
        yield {x: locks.enter_context(locked(f'{x}.lock', x)) for x in folders}


def train(runs: Mapping[str, Config], jobs: int | None = None, gpus: int | None = None) -> None:
    """Train what is not trained yet, and wait for it.

    Args:
        runs (Mapping[str, Config]): See :func:`training`.
        jobs (int, optional): See :func:`training`. Defaults to None.
        gpus (int, optional): See :func:`training`. Defaults to None.

    Raises:
        BlockingIOError: See :func:`training`.
        KeyboardInterrupt: Also on SIGTERM, when the runs have ended.
        RunError: If a run fails, with the end of its log, or leaves no final checkpoint.
        ValueError: If a run is refused, see :func:`training`.
    """
    with training(runs, jobs, gpus) as started:
        started.wait()


@contextmanager
def training(
    runs: Mapping[str, Config],
    jobs: int | None = None,
    gpus: int | None = None,
    beside: int = 0,
) -> Iterator['Training']:
    """Start to train what is not trained yet; runs that were interrupted go on where they were.

    The config of a run is written beside its work dir, with the suffix ``.py``, and its output
    with ``.log``. Runs at the same time share the cores. GPUs are dealt out to them in turn. Runs
    that are not waited for end with the context, and with this process, however it ends.

    Args:
        runs (Mapping[str, Config]): Configs with ``work_dir`` and ``train_cfg.max_epochs``, by the
            name to show.
        jobs (int, optional): Runs at the same time. Defaults to None: all.
        gpus (int, optional): GPUs of each run, or CPU processes where there is no GPU, by
            torchrun. Defaults to None: one process without launcher.
        beside (int): Processes beside the runs that the cores are to be shared with, as this one
            if it works meanwhile. Defaults to 0.

    Yields:
        Training: The runs. Those for which there was room have started.

    Raises:
        BlockingIOError: If another process trains or evaluates one of the runs.
        KeyboardInterrupt: Also on SIGTERM, when the runs have ended.
        ValueError: If a folder holds a run with other settings, or if there are not enough GPUs.
            Nothing is written or trained then.
    """
    for cfg in runs.values():
        check_settings(cfg)
    with reserved(runs.values()) as locks:
        waiting = {name: cfg for name, cfg in runs.items() if not finished(cfg)}
        jobs = min(jobs or len(waiting), len(waiting))
        slots = [_environment(slot, jobs, gpus, beside) for slot in range(jobs)]
        for cfg in runs.values():  # nothing is written if a run is refused
            Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
            write_text(f'{cfg.work_dir}.py', cfg.pretty_text)

        started = Training(waiting, slots, gpus, locks)
        # What ends this process, as a scheduler does, is to end the runs too. Only the main thread
        # may ask for that, and only it may start runs: they would end with another thread.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        before = {number: x for number, x in handlers.items() if x not in (None, signal.SIG_IGN)}
        try:
            for number in before:
                signal.signal(number, started.interrupt)
            started.fill_slots()
            yield started
        finally:
            started.end()
            for number, handler in before.items():
                signal.signal(number, handler)


class Training:
    """Runs of :func:`training`.

    Args:
        runs (Mapping[str, Config]): Configs of the runs, by the name to show.
        slots (list[dict[str, str]]): Environment variables of the runs at one time.
        gpus (int, optional): GPUs of each run.
        locks (Mapping[str, int]): What :func:`reserved` yields, for each run to hold its own.
    """

    def __init__(
        self,
        runs: Mapping[str, Config],
        slots: list[dict[str, str]],
        gpus: int | None,
        locks: Mapping[str, int],
    ) -> None:
        self._runs, self._slots, self._gpus, self._locks = runs, slots, gpus, locks
        self._progress = _Progress(runs, gpus or 1) if runs else None
        self._processes: dict[str, subprocess.Popen] = {}
        self._used: dict[int, subprocess.Popen] = {}
        self._ended: set[str] = set()
        self._is_starting = self._is_interrupted = False

    def fill_slots(self) -> None:
        """Start runs that wait, if there is room and none has failed."""
        if any(process.poll() for process in self._processes.values()):
            return
        waiting = (name for name in self._runs if name not in self._processes)
        for slot, variables in enumerate(self._slots):
            if slot in self._used and self._used[slot].poll() is None:
                continue
            name = next(waiting, None)
            if name is None:
                return
            self._is_starting = True
            try:
                self._used[slot] = self._processes[name] = self._start(name, variables)
            finally:
                self._is_starting = False
            self._heed_interruption()

    def interrupt(self, *_: Any) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: But for the time that a run takes to start: the error would be lost
                in what Python calls when it forks.
        """
        self._is_interrupted = True
        if not self._is_starting:
            raise KeyboardInterrupt

    def _heed_interruption(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def _start(self, name: str, variables: Mapping[str, str]) -> subprocess.Popen:
        work_dir = self._runs[name].work_dir
        prctl = getattr(ctypes.CDLL(None), 'prctl', None)  # found before the process forks
        parent = os.getpid()

        def prepare() -> None:
            """Let Linux send the new process SIGTERM when this one ends, killed or not.

            By SIGTERM torchrun ends its own processes. Those that read images end by themselves
            within seconds when they find that they are alone.
            """
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if prctl:
                prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it has ended meanwhile
                os.kill(os.getpid(), signal.SIGTERM)

        with open(f'{work_dir}.log', 'w') as log:
            return subprocess.Popen(
                _command(self._runs[name], self._gpus, variables),
                env={**os.environ, **variables},
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._locks[work_dir]],
                preexec_fn=prepare,
            )

    def wait(self) -> None:
        """Wait for the end of all runs, and print how far they are.

        Raises:
            RunError: If a run fails, with the end of its log, or leaves no final checkpoint.
        """
        while True:
            self._heed_interruption()
            self.fill_slots()
            statuses = {name: process.poll() for name, process in self._processes.items()}
            for name, status in statuses.items():
                if status:
                    raise RunError(_describe(name, self._runs[name], status))
                if status == 0 and name not in self._ended:
                    final_checkpoint(self._runs[name])
                    self._ended.add(name)
            running = [name for name, status in statuses.items() if status is None]
            if not running and len(statuses) == len(self._runs):
                return
            time.sleep(0.2)
            if self._progress:
                self._progress.tell(running)

    def end(self) -> None:
        """Stop the runs that have not ended."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _describe(name: str, cfg: Config, status: int) -> str:
    """What is told of a run that failed."""
    log = Path(f'{cfg.work_dir}.log')
    tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
    return f'{name} failed with exit status {status}; its log is {log} and ends so:\n{tail}'


def _settings(text: str) -> dict:
    """What a run depends on: its config, but for where it is kept and how it is evaluated."""
    cfg = Config.fromstring(text, '.py').to_dict()
    other = 'work_dir', 'evaluation', 'eval_pipeline', 'images'  # the last tells of changed ones
    return {k: v for k, v in cfg.items() if k not in other}


def _command(cfg: Config, gpus: int | None, variables: Mapping[str, str]) -> list[str]:
    train = [sys.executable, '-m']
    if gpus:
        train += ['torch.distributed.run', f'--nproc_per_node={gpus}']
        train += [f'--master_port={variables.get("PORT") or get_free_port()}', '-m']
    train += ['ser_mm.cli.train', f'{cfg.work_dir}.py', '--work-dir', cfg.work_dir, '--resume']
    return [*train, '--launcher', 'pytorch'] if gpus else train


def _environment(slot: int, jobs: int, gpus: int | None, beside: int) -> dict[str, str]:
    """Cores and GPUs, and the port where one is set, of the runs that take turns in a slot."""
    threads = max(1, count_cores() // (jobs * (gpus or 1) + beside))
    own = dict(OMP_NUM_THREADS=str(threads))
    # By default a thread that waits for the others keeps its core busy. Where cores are shared,
    # steps of the demo on two threads then took 8 times as long.
    own['OMP_WAIT_POLICY'] = os.environ.get('OMP_WAIT_POLICY', 'PASSIVE')
    if (ROOT / 'pyproject.toml').is_file():  # a checkout, which need not be installed
        own['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    if gpus and os.environ.get('PORT'):
        own['PORT'] = str(int(os.environ['PORT']) + slot)
    if torch.cuda.is_available():
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        count = torch.cuda.device_count()
        devices = visible.split(',') if visible else [str(i) for i in range(count)]
        if gpus and jobs * gpus > len(devices):
            raise ValueError(
                f'{jobs} runs at the same time with {gpus} GPUs each need {jobs * gpus}, and there '
                f'are {len(devices)}; lower --jobs or --gpus.'
            )
        first = slot * gpus if gpus else slot % len(devices)
        own['CUDA_VISIBLE_DEVICES'] = ','.join(devices[first : first + (gpus or 1)])
    return own


class _Progress:
    """Says now and then how far runs are, and how long it takes to the end of all."""

    def __init__(self, runs: Mapping[str, Config], gpus: int) -> None:
        self.runs = runs
        self.total, lengths = {}, {}
        for name, cfg in runs.items():
            loader = cfg.train_dataloader
            if loader.get('num_batch_per_epoch'):
                self.total[name] = loader.num_batch_per_epoch * cfg.train_cfg.max_epochs
                continue
            # Without its transforms: what is the same data is listed once.
            dataset = deepcopy(loader.dataset)
            if 'pipeline' in dataset:
                dataset.pipeline = []
            if str(dataset) not in lengths:
                lengths[str(dataset)] = len(DATASETS.build(dataset))
            batches = lengths[str(dataset)] / (loader.batch_size * gpus)
            epoch = math.floor(batches) if loader.get('drop_last') else math.ceil(batches)
            self.total[name] = epoch * cfg.train_cfg.max_epochs
        self.first, self.start, self.said = self._steps(), time.monotonic(), 0.0

    def _steps(self) -> dict[str, int]:
        logged = {name: read_scalars(cfg.work_dir) for name, cfg in self.runs.items()}
        return {name: records[-1]['step'] if records else 0 for name, records in logged.items()}

    def tell(self, running: list[str]) -> None:
        """Print a line, if it is time to and something runs."""
        elapsed = time.monotonic() - self.start
        if elapsed - self.said < SECONDS or not running:
            return
        self.said, now = elapsed, self._steps()
        done = sum(now.values()) - sum(self.first.values())
        left = elapsed * (sum(self.total.values()) - sum(now.values())) / max(done, 1)
        eta = f'{left:.0f} s left' if done else 'starting'
        steps = ', '.join(f'{name} {now[name]}/{self.total[name]}' for name in running)
        ended = sum(bool(finished(cfg)) for name, cfg in self.runs.items() if name not in running)
        count = f' {ended} of {len(self.runs)} runs done,' if len(self.runs) > len(running) else ''
        print(f'[{elapsed:4.0f} s]{count} {steps} steps, {eta}', flush=True)
