"""Writing checkpoints such that a kill or a full disk loses none, and finding the last good one."""

import logging
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS

from ser_mm.arguments import Name, Natural, Rule, checked, filled
from ser_mm.checkpoint import read_checkpoint

_PART = '.part'
_EVERY = Annotated[int, Rule('of at least 1, or -1', lambda x: x >= 1 or x == -1)]
_NAMES = Name | Annotated[Sequence[Name], filled] | None
_RULE = Literal['greater', 'less']


@HOOKS.register_module()
@checked(
    interval=_EVERY,
    out_dir=Name | os.PathLike | None,
    max_keep_ckpts=_EVERY,
    save_best=_NAMES,
    rule=_RULE | Annotated[Sequence[_RULE], filled] | None,
    greater_keys=Annotated[Sequence[Name], filled] | None,
    less_keys=Annotated[Sequence[Name], filled] | None,
    filename_tmpl=Annotated[str, Rule("with '{}' for the number", lambda x: '{}' in x)] | None,
    published_keys=_NAMES,
    save_begin=Natural,
)
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
        if not isinstance(self.file_backend, LocalBackend):
            return
        # A copied folder has a best checkpoint of its own; the path is that of the original, which
        # the next better one would remove.
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = self._in_this_folder(self.best_ckpt_path)
        paths = getattr(self, 'best_ckpt_path_dict', {})
        paths.update({key: self._in_this_folder(path) for key, path in paths.items() if path})
        if is_main_process():
            for part in Path(self.out_dir).glob(f'*{_PART}'):
                part.unlink(missing_ok=True)

    def _in_this_folder(self, path: str) -> str:
        return os.path.join(self.out_dir, os.path.basename(path))

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

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Write the best checkpoint beside too, and remove the one before only then."""
        if not isinstance(self.file_backend, LocalBackend):
            super()._save_best_checkpoint(runner, metrics)
            return
        save, backend = runner.save_checkpoint, self.file_backend
        outdated = _Postponed()

        def save_beside(out_dir: str, filename: str, **kwargs) -> None:
            if filename.endswith(_PART):  # written by _save_checkpoint_with_step
                save(out_dir, filename, **kwargs)
                return
            save(out_dir, filename + _PART, **kwargs)
            if is_main_process():
                path = os.path.join(out_dir, filename)
                _rename_when_written(path + _PART, path)
                outdated.remove_all(but=path)

        self.file_backend = outdated
        runner.save_checkpoint = save_beside
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
            del runner.save_checkpoint


class _Postponed(LocalBackend):
    """Files on this machine, removed when that is asked for again."""

    def __init__(self) -> None:
        super().__init__()
        self._files: list[str] = []

    def remove(self, filepath: str) -> None:
        """Remember the file."""
        self._files.append(filepath)

    def remove_all(self, but: str) -> None:
        """Remove the files."""
        for file in self._files:
            if os.path.abspath(file) != os.path.abspath(but):
                Path(file).unlink(missing_ok=True)
        self._files.clear()


def _rename_when_written(part: str, path: str) -> None:
    """Give a file its name when its content is on the disk."""
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def find_resumable(cfg: Config) -> str | None:
    """The newest checkpoint of a run's folder that can be read; those passed over are logged.

    The file in this folder that ``last_checkpoint`` names comes first, as a run may have gone on
    from an earlier one than the last; its path is not followed, as in a copied folder it is that of
    the original. Later ones, of a run that was killed before it wrote that file, come before it.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Returns:
        str | None: Its path; None if there is none.

    Raises:
        ValueError: If there are checkpoints, and none can be read.
        pickle.UnpicklingError: If the newest holds more than data.
    """
    reasons = []
    for file in _newest_first(cfg):
        try:
            content = read_checkpoint(str(file))
            missing = {'state_dict', 'meta'} - set(content)
            if not missing:
                return str(file)
            reasons.append(f'{file} has no {", ".join(sorted(missing))}.')
        except (ValueError, OSError) as error:
            reasons.append(str(error))
        print_log(f'Passed over: {reasons[-1]}', logger='current', level=logging.WARNING)
    if reasons:
        raise ValueError(
            f'None of the {len(reasons)} checkpoints in {_place(cfg)[0]} can be resumed from: '
            f'{reasons[0]} Remove them to start from the beginning, or name one with --resume FILE.'
        )
    return None


def written_checkpoints(cfg: Config) -> dict[Path, int]:
    """Checkpoints in a run's folder, which are not read.

    Args:
        cfg (Config): Config of the run, with ``work_dir``.

    Returns:
        dict[Path, int]: When they were written, in ns; first the one that is resumed from.
    """
    return {file: _written(file) for file in _newest_first(cfg)}


def _newest_first(cfg: Config) -> list[Path]:
    """Checkpoints of a run's folder, in the order of :func:`find_resumable`."""
    folder, template = _place(cfg)
    pattern = re.compile(re.escape(template).replace(re.escape('{}'), r'(\d+)'))
    found = [(pattern.fullmatch(file.name), file) for file in folder.glob('*')]
    files = {file: int(match[1]) for match, file in found if match}
    pointer = Path(cfg.work_dir, 'last_checkpoint')
    named = folder / Path(pointer.read_text().strip() or '-').name if pointer.is_file() else None

    def order(file: Path) -> tuple[int, int]:
        if named not in files or file == named:
            return file == named, files[file]
        is_later = files[file] > files[named] and _written(file) >= _written(named)
        return 2 if is_later else 0, files[file]

    return sorted(files, key=order, reverse=True)


def _place(cfg: Config) -> tuple[Path, str]:
    """Folder of a run's checkpoints, and how they are named."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    out_dir = hook.get('out_dir')
    folder = Path(cfg.work_dir)
    if out_dir and os.path.abspath(out_dir) != os.path.abspath(cfg.work_dir):
        folder = Path(out_dir, folder.name)
    by_epoch = hook.get('by_epoch', True)
    return folder, hook.get('filename_tmpl') or ('epoch_{}.pth' if by_epoch else 'iter_{}.pth')


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # the oldest, removed meanwhile
        return 0


def resume_newest(cfg: Config) -> None:
    """Let a run go on from the newest readable checkpoint of its folder, or start if it has none.

    Checkpoints in a remote store are left to MMEngine.

    Args:
        cfg (Config): Config of the run, with ``work_dir``; changed in place. Where there is no
            checkpoint, the run starts from its ``load_from``, if it has one.

    Raises:
        ValueError: See :func:`find_resumable`.
        pickle.UnpicklingError: Likewise.
    """
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if '://' in str(hook.get('out_dir')) or hook.get('backend_args'):
        cfg.resume, cfg.load_from = True, None
        return
    found = find_resumable(cfg)
    cfg.resume = found is not None
    if cfg.resume:
        cfg.load_from = found
        told = f'Resuming from {found}.'
    else:
        told = f'There is nothing to resume in {cfg.work_dir}; the run starts from the beginning.'
    print_log(told, logger='current')


def check_same_on_all_ranks(cfg: Config) -> None:
    """Refuse a run whose ranks would resume from different checkpoints, as without a shared disk.

    Args:
        cfg (Config): Config of the run, of each rank.

    Raises:
        ValueError: If they differ.
    """
    own = Path(cfg.load_from).name if cfg.get('resume') and cfg.get('load_from') else 'none'
    names = all_gather_object(own)
    if len(set(names)) > 1:
        raise ValueError(
            f'The ranks would resume from different checkpoints ({", ".join(names)}); let all '
            f'machines see the same work_dir={cfg.work_dir}, or copy its newest checkpoint to each.'
        )
