"""Writing checkpoints such that a kill or a full disk loses none, and finding the last good one."""

import logging
import os
import re
from collections import deque
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from ser_mm.checkpoint import read_checkpoint

_NUMBERED = re.compile(r'(epoch|iter)_(\d+)\.pth')
_PART = '.part'


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, which never has less than it is told to keep.

    MMEngine removes the oldest checkpoint, then writes the new one under its final name: a run
    that is killed in between, or meets a full disk, has one file less, and a damaged one. Here a
    checkpoint is written beside, gets its name when it is complete, and only then the oldest is
    removed. In a remote store the base class does the work.

    Args:
        **kwargs: Those of ``CheckpointHook``: interval, max_keep_ckpts, ...
    """

    def before_train(self, runner: Runner) -> None:
        """Find the folder, and remove what an interrupted write has left in it."""
        super().before_train(runner)
        if is_main_process() and isinstance(self.file_backend, LocalBackend):
            for part in Path(self.out_dir).glob(f'*{_PART}'):
                part.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if not isinstance(self.file_backend, LocalBackend):
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            # A deque that is full drops its first entry by itself; which one has to be known.
            kept = [*self.keep_ckpt_ids, step]
            outdated, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name + _PART,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            _rename_when_written(self.last_ckpt + _PART, self.last_ckpt)
            pointer = os.path.join(runner.work_dir, 'last_checkpoint')
            Path(pointer + _PART).write_text(self.last_ckpt)
            _rename_when_written(pointer + _PART, pointer)
            for old in outdated:
                Path(self.out_dir, self.filename_tmpl.format(old)).unlink(missing_ok=True)


def _rename_when_written(part: str, path: str) -> None:
    """Give a file its name when its content is on the disk."""
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def find_resumable(cfg: Config) -> str | None:
    """The newest checkpoint of a run's folder that can be read; those passed over are logged.

    ``last_checkpoint``, which MMEngine goes by, holds an absolute path: in a copied folder it names
    the original, and it may name a file that is cut off.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Returns:
        str | None: Its path; None if there is none.

    Raises:
        pickle.UnpicklingError: If the newest holds more than data.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    folder = Path(cfg.work_dir)
    if hook.get('out_dir'):
        folder = Path(hook['out_dir'], folder.name)
    found = [(_NUMBERED.fullmatch(file.name), file) for file in folder.glob('*.pth')]
    found = [(match[1], int(match[2]), file) for match, file in found if match]
    # Numbers, as a copy may have been made in any order; but those of epochs and of iterations
    # cannot be compared.
    mixed = len({kind for kind, *_ in found}) > 1
    found.sort(key=lambda x: x[2].stat().st_mtime_ns if mixed else x[1], reverse=True)
    for _, _, file in found:
        try:
            content = read_checkpoint(str(file))
            missing = {'state_dict', 'optimizer', 'meta'} - set(content)
            if not missing:
                return str(file)
            reason = f'{file} has no {", ".join(sorted(missing))}'
        except (ValueError, OSError) as error:
            reason = str(error)
        print_log(f'Passed over: {reason}', logger='current', level=logging.WARNING)
    return None


def resume_newest(cfg: Config) -> None:
    """Let a run go on from the newest readable checkpoint of its folder, or start if it has none.

    Args:
        cfg (Config): Config of the run, with ``work_dir``; changed in place. Where there is no
            checkpoint, the run starts from its ``load_from``, if it has one.

    Raises:
        pickle.UnpicklingError: See :func:`find_resumable`.
    """
    found = find_resumable(cfg)
    cfg.resume = found is not None
    if cfg.resume:
        cfg.load_from = found
        told = f'The run goes on from {found}.'
    else:
        told = f'There is nothing to resume in {cfg.work_dir}; the run starts from the beginning.'
    print_log(told, logger='current')
