"""Pretrain with and without SER at toy scale, evaluate, and draw what happened.

From each seed, three arms are trained side by side: the base algorithm (baseline), SER, and SER
with its loss weighted 0 (views only), which tells what the added views do by themselves. Trained
arms are not trained again, interrupted ones go on: run the same command again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.cli._arguments import make_table
from ser_mm.datasets import BundledPhotos
from ser_mm.evaluation import (
    build_backbone,
    build_loader,
    equivariance_score,
    extract_features,
    knn_probe,
    linear_probe,
)
from ser_mm.experiments.runs import finished, train
from ser_mm.visualization import (
    draw_losses,
    draw_token_maps,
    draw_views,
    read_scalars,
    restore_images,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'demo'
CLASSES = BundledPhotos.METAINFO['classes']
STRIDE = 4  # between the validation crops that equivariance is measured on
ARMS = {
    'baseline': ('{}.py', {}),
    'views only': ('ser_{}.py', {'model.loss_weight': 0.0}),
    'SER': ('ser_{}.py', {}),
}
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


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    names = sorted(file.stem.removeprefix('ser_') for file in CONFIGS.glob('ser_*.py'))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--algorithm', choices=names, default='mocov3')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--epochs', type=int, help='train for so many epochs, at least 2')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override fields of the configs of all arms',
    )
    args = parser.parse_args()
    if args.epochs is not None and args.epochs < 2:
        parser.error('--epochs must be at least 2: the first one is the warm-up.')
    return args


def arm_config(args: argparse.Namespace, arm: str, seed: int) -> Config:
    """Config of one run: that of its arm, with the overrides of the command line."""
    file, options = ARMS[arm]
    cfg = Config.fromfile(CONFIGS / file.format(args.algorithm))
    cfg.merge_from_dict({**options, **args.cfg_options})
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(args.work_dir / args.algorithm / f'seed{seed}' / arm.replace(' ', '_'))
    if args.epochs is not None:
        cfg.train_cfg.max_epochs = cfg.param_scheduler[1].end = args.epochs
    return cfg


def build_token_map(
    cfg: Config, seed: int, checkpoint: str | None, layer: int
) -> Callable[[Tensor], Tensor]:
    """The network up to its token map after block ``layer``."""
    set_random_seed(seed)
    network = build_backbone(cfg, checkpoint, out_type='featmap', out_indices=[layer - 1])
    return lambda images: network(images)[0]


def evaluate(cfg: Config, seed: int, checkpoint: str | None, layer: int, splits: dict) -> dict:
    """Figures of one network.

    Args:
        cfg (Config): Config of its run.
        seed (int): Seed of its run.
        checkpoint (str | None): Its final checkpoint; None for the untrained network.
        layer (int): Block whose token map is scored.
        splits (dict): Preprocessor and batches of 'train' and 'val'.

    Returns:
        dict: A value for each of ``COLUMNS``.
    """
    set_random_seed(seed)
    network = build_backbone(cfg, checkpoint)
    features = [x for split in splits.values() for x in extract_features(network, *split)]
    preprocessor, batches = splits['val']
    images = torch.cat([preprocessor(batch)['inputs'] for batch in batches])[::STRIDE]
    maps = build_token_map(cfg, seed, checkpoint, layer)
    grid = [round(side * 1.3**0.5) for side in network.patch_resolution]
    records = read_scalars(cfg.work_dir) if checkpoint else []
    model = MODELS.build(cfg.model)
    return dict(
        probe=linear_probe(*features),
        knn=knn_probe(*features),
        rot90=equivariance_score(maps, images, elements=1),
        flip=equivariance_score(maps, images, elements=4),
        scale=equivariance_score(maps, images, grid=grid),
        step=statistics.median(r['time'] for r in records) if records else float('nan'),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        backbone=sum(p.numel() for p in network.parameters()),
    )


def summarize(results: dict[str, list[dict]]) -> str:
    """Markdown table of the results: mean and, over several seeds, standard deviation."""
    rows = []
    for arm, runs in results.items():
        cells = []
        for key, (_, form) in COLUMNS.items():
            values = [run[key] for run in runs]
            cell = format(statistics.mean(values), form)
            if len({str(value) for value in values}) > 1:
                cell += f' ± {format(statistics.stdev(values), form)}'
            cells.append(cell.replace('nan', '-'))
        rows.append([arm, *cells])
    return make_table(['', *(title for title, _ in COLUMNS.values())], rows)


def draw(out: Path, arms: dict[str, Config], seed: int, layer: int, val: tuple) -> None:
    """Draw losses, views and token maps of the arms of one seed."""
    draw_losses({arm: cfg.work_dir for arm, cfg in arms.items()}, out / 'losses.png')
    draw_views(arms['SER'], out / 'views.png')
    preprocessor, batches = val
    images = torch.cat([preprocessor(batch)['inputs'] for batch in batches])[::STRIDE]
    labels = [int(sample.gt_label) for batch in batches for sample in batch['data_samples']]
    draw_token_maps(
        {arm: build_token_map(cfg, seed, finished(cfg), layer) for arm, cfg in arms.items()},
        images,
        lambda images: restore_images(images, preprocessor),
        out / 'token_maps.png',
        shown=labels[::STRIDE].index(CLASSES.index('china')),
    )


def main() -> None:
    """Train, evaluate, print the table, draw."""
    args = parse_args()
    start = time.monotonic()
    MMLogger.get_instance('demo', log_level='WARNING')
    results = {name: [] for name in ('untrained', *ARMS)}
    out = args.work_dir / args.algorithm
    for seed in args.seeds:
        arms = {arm: arm_config(args, arm, seed) for arm in ARMS}
        init_default_scope(arms['SER'].default_scope)
        loaders = {split: build_loader(arms['SER'], split) for split in ('train', 'val')}
        splits = {split: (pre, list(batches)) for split, (pre, batches) in loaders.items()}
        print(f'seed {seed}: pretraining {", ".join(arms)}; logs are in {out}/seed{seed}')
        train(arms)
        layer = arms['SER'].model.algorithm.backbone.ser_layer
        print(f'seed {seed}: evaluating', flush=True)
        results['untrained'].append(evaluate(arms['baseline'], seed, None, layer, splits))
        for arm, cfg in arms.items():
            results[arm].append(evaluate(cfg, seed, finished(cfg), layer, splits))
        if seed == args.seeds[0]:
            draw(out, arms, seed, layer, splits['val'])

    crops = sum(len(batch['data_samples']) for batch in splits['val'][1])
    cores = len(os.sched_getaffinity(0))
    notes = [
        f'{arms["SER"].train_cfg.max_epochs} epochs, seeds {args.seeds}'
        + (': mean ± standard deviation.' if len(args.seeds) > 1 else '.'),
        f'Accuracies: last [CLS] token, {crops} validation crops of {len(CLASSES)} pictures '
        f'(chance {1 / len(CLASSES):.3f}).',
        f'R2: token map after block {layer}, moved, against that of the moved image, on every '
        f'{STRIDE}th validation crop; 1 is exact.',
        f'Steps: median, all arms running at once on {cores} cores.',
        '"views only" is SER with its gradient cut.',
    ]
    table = f'{summarize(results)}\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n'
    (out / 'table.md').write_text(table)
    (out / 'results.json').write_text(json.dumps(dict(seeds=args.seeds, results=results), indent=1))
    print(f'\n{table}\nTable, results and figures are in {out} ({time.monotonic() - start:.0f} s).')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted; the same command goes on from the last epoch.')
