"""The demo: the gradient sweep at toy scale, with a first table early, and pictures."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS
from torch import Tensor, nn

from ser_mm.datasets import BundledPhotos, split_batches
from ser_mm.engine.configs import CONFIG_ROOT
from ser_mm.engine.cpu import count_cores
from ser_mm.engine.logs import read_scalars
from ser_mm.evaluation.backbone import build_backbone, build_model, token_maps_of
from ser_mm.evaluation.data import build_loader, spaced_images, spaced_indices
from ser_mm.evaluation.results import describe_seeds, format_mean, make_table
from ser_mm.experiments.figures import evaluate
from ser_mm.experiments.runs import check_settings, final_checkpoint, reserved, train, training
from ser_mm.experiments.sweeps import load_base, points, run_config, ser_layer
from ser_mm.files import write_text
from ser_mm.views import ViewBatch
from ser_mm.visualization import draw_losses, draw_token_maps, draw_views, restore_images

CONFIGS = CONFIG_ROOT / 'demo'
CLASSES = BundledPhotos.METAINFO['classes']
STRIDE = 4
"""Between the validation crops that equivariance is measured on."""
ARMS = ('baseline', 'views only', 'SER')
FIRST = ('baseline', 'SER')
"""Arms that are trained first, for a first table; the other one tells what the views do."""
COLUMNS = {
    'probe': ('linear probe', '.3f'),
    'knn': ('k-NN', '.3f'),
    'rot90': ('R2 rot90', '.3f'),
    'flip': ('R2 flip', '.3f'),
    'scale': ('R2 scale', '.3f'),
    'step': ('s / step', '.2f'),
    'trainable': ('trainable parameters', ',.0f'),
    'backbone': ('in backbone', ',.0f'),
}
SCORES = dict(rot90='rot90', flip='flip_lr', scale='scale')
"""Columns of R2, and what the transformations are called in the figures of a run."""


def algorithms() -> list[str]:
    """The algorithms that there is a demo of."""
    return sorted(file.stem.removeprefix('ser_') for file in CONFIGS.glob('ser_*.py'))


def demo_configs(
    algorithm: str, seed: int, work_dir: Path, cfg_options: Mapping[str, Any]
) -> dict[str, Config]:
    """Configs of the runs of one seed, by arm.

    Args:
        algorithm (str): Of :func:`algorithms`.
        seed (int): Seed of the runs.
        work_dir (Path): Folder of the demo.
        cfg_options (Mapping[str, Any]): Fields to override in all of them.
    """
    base = load_base(CONFIGS / f'ser_{algorithm}.py', cfg_options)
    init_default_scope(base.default_scope)
    return {
        arm: run_config(base, point, seed, work_dir, cfg_options)
        for arm, point in points(base, 'gradient').items()
    }


def run_demo(
    algorithm: str, seeds: Sequence[int], work_dir: Path, cfg_options: Mapping[str, Any]
) -> Path:
    """Train with and without SER, evaluate, print tables, and draw.

    The table is written as ``table.md`` and ``results.json``; of the first seed, losses, views and
    token maps are drawn.

    Args:
        algorithm (str): Of :func:`algorithms`.
        seeds (Sequence[int]): Seeds of the runs.
        work_dir (Path): Folder of the demo, where each algorithm has its own.
        cfg_options (Mapping[str, Any]): Fields of the configs to override.

    Returns:
        Path: Folder of the results.

    Raises:
        BlockingIOError: If another process trains or evaluates one of the runs.
        RunError: If a run fails.
        ValueError: If a folder holds a run with other settings.
    """
    out = work_dir / algorithm
    results: dict[str, list[dict]] = {name: [] for name in ('untrained', *ARMS)}
    clock = _Clock()
    configs = {seed: demo_configs(algorithm, seed, work_dir, cfg_options) for seed in seeds}
    runs = [cfg for arms in configs.values() for cfg in arms.values()]
    for cfg in runs:
        check_settings(cfg)  # of all arms, before the first is trained
    with reserved(runs):
        for seed, arms in configs.items():
            layer = ser_layer(arms['SER'], arms['SER'])
            val = DATASETS.build(arms['SER'].evaluation.val)
            images = max(1, len(val) // STRIDE)
            untrained = deepcopy(arms['baseline'])
            untrained.work_dir = str(Path(untrained.work_dir).with_name('untrained'))
            first = {arm: arms[arm] for arm in FIRST}
            rest = {arm: cfg for arm, cfg in arms.items() if arm not in FIRST}

            print(f'seed {seed}: pretraining {" and ".join(first)}; logs are in {out}/seed{seed}')
            train(first)
            clock.stop('training')
            with training(rest, beside=1) as started, _threads(1):  # it goes on meanwhile
                _measure({'untrained': untrained, **first}, results, seed, layer, images)
                clock.stop('evaluation')
                if seed == seeds[0]:
                    table = summarize({name: runs for name, runs in results.items() if runs})
                    print(f'\nFirst table, of seed {seed} ({clock}):\n\n{table}\n')
                print(f'seed {seed}: pretraining {" and ".join(rest)}', flush=True)
                started.wait()
            clock.stop('training')
            _measure(rest, results, seed, layer, images)
            if seed == seeds[0]:
                draw(out, arms, layer, images)
            clock.stop('evaluation')

    cores = count_cores()
    notes = [
        f'{arms["SER"].train_cfg.max_epochs} epochs, {describe_seeds(seeds)}',
        f'Accuracies: last [CLS] token, {len(val)} validation crops of {len(CLASSES)} pictures '
        f'(chance {1 / len(CLASSES):.3f}).',
        f'R2: token map after block {layer}, moved, against that of the moved image, on every '
        f'{STRIDE}th validation crop; 1 is exact.',
        f'Steps: median, {" and ".join(FIRST)} running at once on {cores} cores, '
        f'{" and ".join(rest)} after them.',
        '"views only" is SER with its gradient cut.',
    ]
    table = f'{summarize(results)}\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n'
    write_text(out / 'table.md', table)
    write_text(out / 'results.json', json.dumps(dict(seeds=list(seeds), results=results), indent=1))
    print(f'\n{table}\nTable, results and figures are in {out} ({clock}).')
    return out


def _measure(
    networks: Mapping[str, Config],
    results: Mapping[str, list[dict]],
    seed: int,
    layer: int,
    images: int,
) -> None:
    """Add the figures of networks to the results."""
    for name, cfg in networks.items():
        print(f'seed {seed}: evaluating {name}', flush=True)
        checkpoint = None if name == 'untrained' else final_checkpoint(cfg)
        results[name].append(figures(cfg, checkpoint, layer, images))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Leave cores to other processes: torch's threads would wait for each other busily."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.monotonic()

    def stop(self, what: str) -> None:
        now = time.monotonic()
        self.spent[what] = self.spent.get(what, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        parts = ', '.join(f'{what} {seconds:.0f} s' for what, seconds in self.spent.items())
        return f'{sum(self.spent.values()):.0f} s: {parts}'


def figures(cfg: Config, checkpoint: str | None, layer: int, images: int) -> dict[str, float]:
    """Figures of one network, a value for each of :data:`COLUMNS`.

    Args:
        cfg (Config): Config of its run.
        checkpoint (str, optional): Its final checkpoint. None for the untrained network.
        layer (int): Block whose token map is scored, counted from 1.
        images (int): Validation crops that it is scored on.
    """
    found = evaluate(cfg, checkpoint, images)
    model = build_model(cfg)
    records = read_scalars(cfg.work_dir) if checkpoint else []
    return dict(
        probe=found['probe'],
        knn=found['knn'],
        **{name: found['layers'][moves][layer - 1]['r2'] for name, moves in SCORES.items()},
        step=statistics.median(r['time'] for r in records) if records else float('nan'),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        backbone=sum(p.numel() for p in model.backbone.parameters()),
    )


def summarize(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown table of figures: mean and, over several seeds, standard deviation.

    Args:
        results (Mapping): By the name of a network, what :func:`figures` returned for each seed.
    """
    rows = [
        [
            name,
            *(format_mean([run[key] for run in runs], form) for key, (_, form) in COLUMNS.items()),
        ]
        for name, runs in results.items()
    ]
    return make_table(['', *(title for title, _ in COLUMNS.values())], rows)


def draw(out: Path, arms: Mapping[str, Config], layer: int, images: int) -> None:
    """Draw losses, views and token maps of the arms of one seed.

    Args:
        out (Path): Folder of the figures.
        arms (Mapping[str, Config]): Configs of finished runs.
        layer (int): Block whose token maps are drawn.
        images (int): Validation crops that determine the colours of the maps.
    """
    draw_losses({arm: read_scalars(cfg.work_dir) for arm, cfg in arms.items()}, out / 'losses.png')
    views, preprocessor = training_views(arms['SER'])
    draw_views(views, lambda x: restore_images(x, preprocessor), out / 'views.png')
    cfg = arms['SER']
    val = DATASETS.build(cfg.evaluation.val)
    labels = [val.get_data_info(i)['gt_label'] for i in spaced_indices(len(val), images)]
    preprocessor, _ = build_loader(cfg, 'val')
    draw_token_maps(
        {arm: token_map(cfg, final_checkpoint(cfg), layer) for arm, cfg in arms.items()},
        torch.cat(list(spaced_images(cfg, 'val', images))),
        lambda x: restore_images(x, preprocessor),
        out / 'token_maps.png',
        shown=labels.index(CLASSES.index('china')),
    )


def token_map(cfg: Config, checkpoint: str | None, layer: int) -> Callable[[Tensor], Tensor]:
    """A network up to its token map after a block, from images (N, 3, H, W) to (N, C, h, w).

    Args:
        cfg (Config): Config of its run.
        checkpoint (str, optional): Its checkpoint. None for the untrained network.
        layer (int): Block, counted from 1.
    """
    network = build_backbone(cfg, checkpoint)

    def take(images: Tensor) -> Tensor:
        with token_maps_of(network) as token_maps:
            return token_maps(images)[layer - 1]

    return take


def training_views(cfg: Config) -> tuple[list[ViewBatch], nn.Module]:
    """Both views of the first batch, out of a run's own loader and preprocessor.

    Args:
        cfg (Config): Config of a SER run.

    Returns:
        tuple: The two views, and the preprocessor that normalized them.
    """
    init_default_scope(cfg.default_scope)
    # Of one batch, which need not be copied faster.
    loader = Runner.build_dataloader(dict(deepcopy(cfg.train_dataloader), pin_memory=False), seed=0)
    split_batches(loader)
    preprocessor = build_model(cfg).data_preprocessor
    return preprocessor(next(iter(loader)), training=True)['inputs'][:2], preprocessor
