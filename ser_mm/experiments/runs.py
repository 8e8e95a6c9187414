"""Training runs as processes of ``tools/train.py``: several at a time, resumed and watched."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config
from mmpretrain.registry import DATASETS

from ser_mm.engine.logs import read_scalars

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SECONDS = 15
"""Between two lines of progress."""


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


def train(runs: Mapping[str, Config], jobs: int | None = None, gpus: int | None = None) -> None:
    """Train what is not trained yet; runs that were interrupted go on from their last checkpoint.

    The config of a run is written beside its work dir, with the suffix ``.py``, and its output
    with ``.log``. Runs at one time share the cores. GPUs are dealt out to them in turn.

    Args:
        runs (Mapping[str, Config]): Configs with ``work_dir`` and ``train_cfg.max_epochs``, by the
            name to show.
        jobs (int, optional): Runs at one time. Defaults to None: all.
        gpus (int, optional): GPUs of each run, or CPU processes where there is no GPU, by
            ``tools/dist_train.sh``. Defaults to None: one process without launcher.

    Raises:
        KeyboardInterrupt: Also on SIGTERM, when the runs have ended.
        SystemExit: If a run fails, with the end of its log, if its folder holds a run with other
            settings, or if there are not enough GPUs.
    """
    waiting = {}
    for name, cfg in runs.items():
        config = Path(f'{cfg.work_dir}.py')
        if config.exists() and _settings(config.read_text()) != _settings(cfg.pretty_text):
            sys.exit(
                f'{cfg.work_dir} holds a run with other settings ({config}); remove it or choose '
                'another --work-dir.'
            )
        if not finished(cfg):
            waiting[name] = cfg
    for cfg in runs.values():  # nothing is written if a run is refused
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
        Path(f'{cfg.work_dir}.py').write_text(cfg.pretty_text)
    if not waiting:
        return

    jobs = min(jobs or len(waiting), len(waiting))
    slots = [_environment(slot, jobs, gpus) for slot in range(jobs)]
    progress = _Progress(waiting, gpus or 1)
    processes, used = {}, {}
    # What ends this process, as a scheduler does, is to end the runs too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while any(name not in processes or processes[name].poll() is None for name in waiting):
            failed = [name for name, process in processes.items() if process.poll()]
            if failed:
                break
            free = [i for i in range(jobs) if i not in used or used[i].poll() is not None]
            for slot, name in zip(free, [n for n in waiting if n not in processes], strict=False):
                with open(f'{waiting[name].work_dir}.log', 'w') as log:
                    used[slot] = processes[name] = subprocess.Popen(
                        _command(waiting[name], gpus),
                        env={**os.environ, **slots[slot]},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
            time.sleep(1)
            progress.tell([name for name, process in processes.items() if process.poll() is None])
        failed = [name for name, process in processes.items() if process.poll()]
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
    if failed:
        log = Path(f'{waiting[failed[0]].work_dir}.log')
        tail = log.read_text().splitlines()[-15:]
        status = processes[failed[0]].returncode
        sys.exit('\n'.join([*tail, f'{failed[0]} failed ({status}); its whole log is {log}']))


def _settings(text: str) -> dict:
    """What a run depends on: its config, but for where it is kept and how it is evaluated."""
    cfg = Config.fromstring(text, '.py').to_dict()
    return {k: v for k, v in cfg.items() if k not in ('work_dir', 'evaluation', 'eval_pipeline')}


def _command(cfg: Config, gpus: int | None) -> list[str]:
    train = [sys.executable, str(TOOLS / 'train.py'), f'{cfg.work_dir}.py']
    if gpus:
        train = ['bash', str(TOOLS / 'dist_train.sh'), f'{cfg.work_dir}.py', str(gpus)]
    return [*train, '--resume', '--work-dir', cfg.work_dir]


def _environment(slot: int, jobs: int, gpus: int | None) -> dict[str, str]:
    """Cores, GPUs and port of the runs that take turns in a slot."""
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * (gpus or 1)))
    own = dict(OMP_NUM_THREADS=str(threads))
    if gpus:
        own['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'
        own['VIRTUAL_ENV'] = sys.prefix  # dist_train.sh is to take this Python
        own['PORT'] = str(int(os.environ.get('PORT', 29500)) + slot)
    if torch.cuda.is_available():
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        count = torch.cuda.device_count()
        devices = visible.split(',') if visible else [str(i) for i in range(count)]
        if gpus and jobs * gpus > len(devices):
            sys.exit(
                f'{jobs} runs at one time with {gpus} GPUs each need {jobs * gpus}, and there are '
                f'{len(devices)}; lower --jobs or --gpus.'
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
