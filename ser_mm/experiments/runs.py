"""Training runs as processes of ``ser-mm train``: several at a time, resumed and watched."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config
from mmpretrain.registry import DATASETS

from ser_mm.engine.logs import SECONDS, read_scalars
from ser_mm.evaluation.results import write_text

ROOT = Path(__file__).resolve().parents[2]
"""Folder that holds the package, a checkout or where packages are installed."""


class RunError(RuntimeError):
    """A training run ended before its time."""


def finished(cfg: Config) -> str | None:
    """Path of the final checkpoint, if the run has come to its end.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.
    """
    # MMEngine writes this file when the checkpoint that it names is complete.
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    final = Path(cfg.work_dir, f'epoch_{cfg.train_cfg.max_epochs}.pth')
    done = pointer.exists() and Path(pointer.read_text()).name == final.name
    return str(final) if done else None


def check_settings(cfg: Config) -> None:
    """Check that the folder of a run is new, or holds this run.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Raises:
        ValueError: If the folder holds a run with other settings.
    """
    config = Path(f'{cfg.work_dir}.py')
    if config.exists() and _settings(config.read_text()) != _settings(cfg.pretty_text):
        raise ValueError(
            f'{cfg.work_dir} holds a run with other settings ({config}); remove it or choose '
            'another --work-dir.'
        )


def train(runs: Mapping[str, Config], jobs: int | None = None, gpus: int | None = None) -> None:
    """Train what is not trained yet, and wait for it.

    Args:
        runs (Mapping[str, Config]): See :func:`training`.
        jobs (int, optional): See :func:`training`. Defaults to None.
        gpus (int, optional): See :func:`training`. Defaults to None.

    Raises:
        KeyboardInterrupt: Also on SIGTERM, when the runs have ended.
        RunError: If a run fails, with the end of its log.
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
    that are not waited for end with the context.

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
        KeyboardInterrupt: Also on SIGTERM, when the runs have ended.
        ValueError: If a folder holds a run with other settings, or if there are not enough GPUs.
            Nothing is written or trained then.
    """
    for cfg in runs.values():
        check_settings(cfg)
    waiting = {name: cfg for name, cfg in runs.items() if not finished(cfg)}
    jobs = min(jobs or len(waiting), len(waiting))
    slots = [_environment(slot, jobs, gpus, beside) for slot in range(jobs)]
    for cfg in runs.values():  # nothing is written if a run is refused
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(f'{cfg.work_dir}.py'), cfg.pretty_text)

    started = Training(waiting, slots, gpus)
    # What ends this process, as a scheduler does, is to end the runs too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        started.fill_slots()
        yield started
    finally:
        started.end()
        signal.signal(signal.SIGTERM, before)


class Training:
    """Runs of :func:`training`.

    Args:
        runs (Mapping[str, Config]): Configs of the runs, by the name to show.
        slots (list[dict[str, str]]): Environment variables of the runs at one time.
        gpus (int, optional): GPUs of each run.
    """

    def __init__(
        self, runs: Mapping[str, Config], slots: list[dict[str, str]], gpus: int | None
    ) -> None:
        self._runs, self._slots, self._gpus = runs, slots, gpus
        self._progress = _Progress(runs, gpus or 1) if runs else None
        self._processes: dict[str, subprocess.Popen] = {}
        self._used: dict[int, subprocess.Popen] = {}

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
            with open(f'{self._runs[name].work_dir}.log', 'w') as log:
                self._used[slot] = self._processes[name] = subprocess.Popen(
                    _command(self._runs[name], self._gpus, variables),
                    env={**os.environ, **variables},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def wait(self) -> None:
        """Wait for the end of all runs, and print how far they are.

        Raises:
            RunError: If a run fails, with the end of its log.
        """
        while True:
            self.fill_slots()
            statuses = {name: process.poll() for name, process in self._processes.items()}
            for name, status in statuses.items():
                if status:
                    raise RunError(_describe(name, self._runs[name], status))
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
        for process in self._processes.values():
            process.wait()


def _describe(name: str, cfg: Config, status: int) -> str:
    """What is told of a run that failed."""
    log = Path(f'{cfg.work_dir}.log')
    tail = '\n'.join(log.read_text().splitlines()[-15:])
    return f'{name} failed with exit status {status}; its log is {log} and ends so:\n{tail}'


def _settings(text: str) -> dict:
    """What a run depends on: its config, but for where it is kept and how it is evaluated."""
    cfg = Config.fromstring(text, '.py').to_dict()
    return {k: v for k, v in cfg.items() if k not in ('work_dir', 'evaluation', 'eval_pipeline')}


def _command(cfg: Config, gpus: int | None, variables: Mapping[str, str]) -> list[str]:
    train = [sys.executable, '-m']
    if gpus:
        train += ['torch.distributed.run', f'--nproc_per_node={gpus}']
        train += [f'--master_port={variables["PORT"]}', '-m']
    train += ['ser_mm.cli.train', f'{cfg.work_dir}.py', '--work-dir', cfg.work_dir, '--resume']
    return [*train, '--launcher', 'pytorch'] if gpus else train


def _environment(slot: int, jobs: int, gpus: int | None, beside: int) -> dict[str, str]:
    """Cores, GPUs and port of the runs that take turns in a slot."""
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * (gpus or 1) + beside))
    own = dict(OMP_NUM_THREADS=str(threads))
    # By default a thread that waits for the others keeps its core busy. Where cores are shared,
    # steps of the demo on two threads then took 8 times as long.
    own['OMP_WAIT_POLICY'] = os.environ.get('OMP_WAIT_POLICY', 'PASSIVE')
    if (ROOT / 'pyproject.toml').is_file():  # a checkout, which need not be installed
        own['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    if gpus:
        own['PORT'] = str(int(os.environ.get('PORT', 29500)) + slot)
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
