"""From a folder of images to a pretrained backbone, by one call."""

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ser_mm.evaluation.export import export_backbone
from ser_mm.experiments.channels import describe
from ser_mm.experiments.recipes import RUN, pretraining_config, processes
from ser_mm.experiments.report import report
from ser_mm.experiments.runs import check_settings, final_checkpoint, train


def pretrain(data: str | Path, out: str | Path, **options: Any) -> Path:
    """Pretrain a backbone with SER on a folder of images, and say what it learned.

    The same call resumes what was interrupted, and trains nothing twice.

    Args:
        data (str | Path): Folder or list of images, see :class:`~ser_mm.datasets.ImageSource`.
        out (str | Path): Folder of the results.
        **options: Those of :func:`~ser_mm.experiments.recipes.pretraining_config`: model, method,
            weights, image_size, batch_size, epochs, devices, num_workers, val_data, seed, channels.

    Returns:
        Path: ``out``: the config ``run.py``, of which a copy can be trained by ``ser-mm train``;
        ``run/``, with checkpoints and logs; ``report.html``, ``figures.json`` and pictures; and,
        where timm is installed, ``timm/``, see
        :func:`~ser_mm.evaluation.export.export_backbone`.

    Raises:
        BlockingIOError: If another process trains this run.
        FileNotFoundError: If images or weights are missing.
        RunError: If training fails.
        ValueError: If an option does not do, or ``out`` holds another run.

    Example:
        >>> pretrain('my images', 'out', model='vit_tiny_patch16', image_size=64, epochs=20)
    """
    out = Path(out).expanduser()
    cfg = pretraining_config(data, out, **options)
    try:
        check_settings(cfg)
    except ValueError as error:
        raise ValueError(
            f'{out} holds a run with other settings, in {RUN}.py; choose another --out, repeat the '
            'command that it was started with (where that file is not edited), or remove the '
            'folder.'
        ) from error
    name = cfg.model.algorithm.type
    print(f'{name} with SER, {cfg.train_cfg.max_epochs} epochs; logs are in {out}', flush=True)
    if (load := cfg.train_dataloader.dataset.pipeline[0]).type == 'LoadChannels':
        print(describe(load), flush=True)
    train({name: cfg}, gpus=processes(options.get('devices')))
    if unread := skipped(Path(f'{cfg.work_dir}.log')):
        more = f', and {len(unread) - 3} more, see {cfg.work_dir}.log' if unread[3:] else ''
        least = 'At least ' if (processes(options.get('devices')) or 1) > 1 else ''  # rank 0's
        told = '; '.join(unread[:3])
        print(f'{least}{len(unread)} images were left out of training: {told}{more}.')
    checkpoint = final_checkpoint(cfg)
    # What needs no images comes first: some may be unreadable.
    try:
        usage = export_backbone(Config.fromfile(f'{cfg.work_dir}.py'), checkpoint, out / 'timm')
        print(f'{out / "timm"} is for timm:\n\n{usage}')
    except ImportError as error:  # the run has all else
        print(error)
    report(cfg, checkpoint, out)
    return out


def skipped(log: Path) -> list[str]:
    """Images that a training has skipped, each once, with the reason.

    Args:
        log (Path): What it has written; a missing file tells of none.
    """
    if not log.is_file():  # of a run that had ended before
        return []
    found = re.findall(
        r'Skipped an (?:unreadable )?image[,:] (.+)', log.read_text(errors='replace')
    )
    return list(dict.fromkeys(x.rstrip('.') for x in found))
