"""Sweep the settings of SER: train, evaluate, and draw with error bars over seeds.

Sweeps:
    layer        SER after block 1, 2, ..., [CLS] with it (at the last block, one before)
    cls          [CLS] after block 0, 1, ..., SER where the config has it
    equi_ratio, temperature, loss_weight
                 the config's value times 1/4, 1/2, 1, 2, 4
    gradient     the base algorithm, SER with its gradient cut (the same views), SER

Points that sweeps have in common are trained once. Finished runs are not trained again,
interrupted ones go on: run the same command again. At full scale:

    python tools/ablate.py layer cls --config configs/ser_mocov3_vits16.py --gpus 8
"""

import argparse
import hashlib
import json
import shutil
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmpretrain.registry import MODELS

from ser_mm.cli._arguments import (
    check_evaluation,
    make_table,
    positive,
    run,
    write_results,
)
from ser_mm.evaluation import (
    accuracy,
    build_backbone,
    knn_probe,
    linear_probe,
    load_features,
    select_linear_head,
)
from ser_mm.evaluation.equivariance import equivariance_by_layer, spaced_images, token_maps_of
from ser_mm.experiments.runs import finished, train
from ser_mm.visualization import draw_curves

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = ('layer', 'cls', 'equi_ratio', 'temperature', 'loss_weight', 'gradient')
FACTORS = (1 / 4, 1 / 2, 1, 2, 4)
TRANSFORMATIONS = ('rot90', 'flip_lr', 'scale', 'mixture')
SOLVABLE = 20000  # training images up to which the probe is solved to convergence
COLUMNS = {
    'probe': 'linear probe',
    'knn': 'k-NN',
    'r2': 'R2 at SER layer',
    'retrieval': 'retrieval at SER layer',
    'r2_last': 'R2 at last block',
    'retrieval_last': 'retrieval at last block',
}

SER_LAYER = 'model.algorithm.backbone.ser_layer'
CLS_LAYER = 'model.algorithm.backbone.cls_layer'
EQUI_RATIO = 'train_dataloader.dataset.pipeline.1.equi_ratio'
NAMED = (SER_LAYER, CLS_LAYER, EQUI_RATIO, 'model.head.temperature', 'model.loss_weight')

Point = dict[str, Any]
"""Fields of the config to set, by their place in it."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('sweeps', nargs='+', choices=[*SWEEPS, 'all'], metavar='SWEEP')
    parser.add_argument('--config', type=Path, default=ROOT / 'configs/demo/ser_mocov3.py')
    parser.add_argument('--values', nargs='+', type=float, help='of one sweep, instead of its own')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--jobs', type=positive(int), default=1, help='runs at one time (default: 1)'
    )
    parser.add_argument('--gpus', type=positive(int), help='GPUs (or CPU processes) of each run')
    parser.add_argument(
        '--num-workers', type=int, default=0, help='processes that read images to evaluate'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/ablate'))
    parser.add_argument('--images', type=positive(int), default=450, help='for R2 (default: 450)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override fields of the config of all runs',
    )
    args = parser.parse_args()
    args.sweeps = SWEEPS if 'all' in args.sweeps else tuple(dict.fromkeys(args.sweeps))
    if args.values and (len(args.sweeps) != 1 or args.sweeps[0] == 'gradient'):
        parser.error('--values needs one sweep that has values.')
    return args


def load(args: argparse.Namespace) -> Config:
    """The config that the sweeps start from.

    Raises:
        ValueError: If it has no SER, or is not trained by epochs.
    """
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    if cfg.model.type != 'SERAlgorithm' or 'max_epochs' not in cfg.train_cfg:
        raise ValueError(
            f"{args.config}: model.type='{cfg.model.type}', or train_cfg has no max_epochs; choose "
            "a config with type='SERAlgorithm' that is trained by epochs."
        )
    return cfg


def points(cfg: Config, sweep: str, values: list[float] | None) -> dict[Any, Point | None]:
    """The settings of a sweep, those that differ from the config, by the value to show.

    Raises:
        ValueError: If the network has no such setting.
    """
    if sweep == 'gradient':
        return {'baseline': None, 'views only': {'model.loss_weight': 0.0}, 'SER': {}}
    own = cfg.model.algorithm.backbone
    model = MODELS.build(deepcopy(cfg.model))
    depth = getattr(model.backbone, 'num_layers', None) or model.backbone.num_stages
    pipeline = cfg.train_dataloader.dataset.pipeline
    current = {
        SER_LAYER: model.backbone.ser_layer,
        CLS_LAYER: getattr(model.backbone, 'cls_layer', None),
        'model.neck.in_channels': model.ser_neck.in_channels,
        'model.data_preprocessor.patch_size': model.data_preprocessor.patch_size,
        'model.head.temperature': model.ser_head.temperature,
        'model.loss_weight': model.loss_weight,
        EQUI_RATIO: pipeline[1].get('equi_ratio') if len(pipeline) > 1 else None,
    }
    found = {}
    if sweep == 'layer':
        for layer in map(int, values or range(1, depth + 1)):
            options = dict(ser_layer=layer)
            if current[CLS_LAYER] is not None:
                options['cls_layer'] = min(layer, depth - 1)
            # The maps of a ResNet's stages differ in channels and stride.
            part = MODELS.build({**deepcopy(own), **options})
            found[layer] = {
                **{f'model.algorithm.backbone.{key}': value for key, value in options.items()},
                'model.neck.in_channels': part.token_map_channels,
                'model.data_preprocessor.patch_size': part.token_map_stride,
            }
    else:
        place = dict(
            cls=CLS_LAYER,
            equi_ratio=EQUI_RATIO,
            temperature='model.head.temperature',
            loss_weight='model.loss_weight',
        )[sweep]
        if current[place] is None:
            raise ValueError(f'{sweep}: {place} is not in {cfg.filename}; leave this sweep out.')
        if sweep == 'cls':
            values = map(int, values or range(depth))
        elif not values:
            values = [current[place] * factor for factor in FACTORS]
            values = [value for value in values if sweep != 'equi_ratio' or value <= 1]
        found = {value: {place: value} for value in values}
    return {
        value: {place: x for place, x in settings.items() if x != current[place]}
        for value, settings in found.items()
    }


def run_config(args: argparse.Namespace, cfg: Config, point: Point | None, seed: int) -> Config:
    """Config of one run; its folder has the name of what differs from the config of the sweeps."""
    if point is None:
        file = args.config.with_name(args.config.name.removeprefix('ser_'))
        if file == args.config or not file.is_file():
            raise ValueError(f'gradient: {args.config} has no baseline {file.name} beside it.')
        name, own = 'baseline', Config.fromfile(file)
        for place, value in args.cfg_options.items():
            if place.startswith('model.algorithm.'):
                own.merge_from_dict({place.replace('.algorithm', '', 1): value})
            elif place != EQUI_RATIO and not place.startswith('model.'):
                own.merge_from_dict({place: value})
    else:
        own = deepcopy(cfg)
        own.merge_from_dict(point)
        settings = {place.rpartition('.')[2]: x for place, x in point.items() if place in NAMED}
        name = ','.join(f'{key}={x:g}' for key, x in settings.items()) or 'SER'
        name = 'views_only' if settings == dict(loss_weight=0.0) else name
    own.randomness = dict(seed=seed)
    folder = args.config.stem.removeprefix('ser_')
    own.work_dir = str(args.work_dir / folder / f'seed{seed}' / name)
    return own


def evaluate(cfg: Config, layer: int, images: int, num_workers: int = 0) -> dict[str, Any]:
    """Figures of a finished run, kept beside its folder.

    Args:
        cfg (Config): Config of the run.
        layer (int): Block at which SER is, or would be.
        images (int): Validation images that R2 is measured on.
        num_workers (int): Processes that read images. Defaults to 0.

    Returns:
        dict[str, Any]: A value for each of ``COLUMNS``, the last four under 'mixture', and
        ``layers``, the scores of all blocks by transformation.
    """
    file = Path(f'{cfg.work_dir}.json')
    checkpoint = finished(cfg)
    about = dict(
        checkpoint=hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
        evaluation=hashlib.sha256(repr(cfg.evaluation).encode()).hexdigest(),
        images=images,
    )
    if file.exists():
        kept = json.loads(file.read_text())
        if kept.pop('about') == about:
            return _at_layer(kept, layer)
    set_random_seed(0)
    cache = Path(f'{cfg.work_dir}.features')  # for an interruption: those of ImageNet take long
    features = [
        x
        for split in ('train', 'val')
        for x in load_features(cfg, checkpoint, split, cache, num_workers=num_workers)
    ]
    if len(features[0]) <= SOLVABLE:
        probe = linear_probe(*features)
    else:
        head, _ = select_linear_head(*features[:2], cache)
        probe = accuracy(head(features[2]).detach(), features[3])['top1']
    with token_maps_of(build_backbone(cfg, checkpoint)) as token_maps:
        batches = spaced_images(cfg, 'val', images, num_workers=num_workers)
        layers = equivariance_by_layer(token_maps, batches, TRANSFORMATIONS)
    found = dict(probe=probe, knn=knn_probe(*features), layers=layers)
    file.write_text(json.dumps(dict(found, about=about), indent=1))
    shutil.rmtree(cache)
    return _at_layer(found, layer)


def _at_layer(found: dict, layer: int) -> dict[str, Any]:
    mixture = found['layers']['mixture']
    for key in ('r2', 'retrieval'):
        found[key] = mixture[layer - 1][key]
        found[f'{key}_last'] = mixture[-1][key]
    return found


def report(out: Path, sweep: str, results: dict[Any, list[dict]], seeds: list[int]) -> str:
    """Draw a sweep, and make its table: mean and standard deviation over seeds."""

    def summary(values: list[float]) -> tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    rows, panels = [], {title: {sweep: []} for title in COLUMNS.values()}
    for value, runs in results.items():
        cells = []
        for key, title in COLUMNS.items():
            mean, deviation = summary([run[key] for run in runs])
            cells.append(f'{mean:.3f}' + (f' ± {deviation:.3f}' if len(runs) > 1 else ''))
            place = f'{value:g}' if isinstance(value, float) else value  # evenly spaced
            panels[title][sweep].append((place, mean, deviation))
        rows.append([f'{value:g}' if isinstance(value, float) else value, *cells])
    draw_curves(panels, out / f'{sweep}.png', sweep)
    curves = {
        f'{title}, {moves}': {
            f'{value:g}' if isinstance(value, float) else str(value): [
                (i + 1, *summary([run['layers'][moves][i][key] for run in runs]))
                for i in range(len(runs[0]['layers'][moves]))
            ]
            for value, runs in results.items()
        }
        for key, title in dict(r2='R2', retrieval='retrieval').items()
        for moves in TRANSFORMATIONS
    }
    draw_curves(curves, out / f'{sweep}_blocks.png', 'block', len(TRANSFORMATIONS))
    note = f'Seeds {seeds}' + (': mean ± standard deviation.' if len(seeds) > 1 else '.')
    return f'{make_table([sweep, *COLUMNS.values()], rows)}\n\n{note}'


def main() -> None:
    """Train all points, evaluate, print tables, draw."""
    args = parse_args()
    start = time.monotonic()
    MMLogger.get_instance('ablate', log_level='WARNING')
    cfg = load(args)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    sweeps = {
        sweep: {
            value: {seed: run_config(args, cfg, point, seed) for seed in args.seeds}
            for value, point in points(cfg, sweep, args.values).items()
        }
        for sweep in args.sweeps
    }
    # By seed, so that what is ready first is a whole sweep of one seed.
    runs = {
        f'{Path(own.work_dir).name} (seed {seed})': own
        for seed in args.seeds
        for settings in sweeps.values()
        for own in (by_seed[seed] for by_seed in settings.values())
    }
    for own in {str(own.get('evaluation')): own for own in runs.values()}.values():
        check_evaluation(own)  # before days of training
    out = args.work_dir / args.config.stem.removeprefix('ser_')
    todo = sum(not finished(own) for own in runs.values())
    print(f'{len(runs)} runs, {todo} to train; logs are in {out}', flush=True)
    train(runs, args.jobs, args.gpus)

    for sweep, settings in sweeps.items():
        results = {}
        for value, by_seed in settings.items():
            print(f'evaluating {sweep} {value}', flush=True)
            results[value] = []
            for own in by_seed.values():
                backbone = (own.model.get('algorithm') or own.model).backbone
                layer = backbone.get('ser_layer') or cfg.model.algorithm.backbone.ser_layer
                results[value].append(evaluate(own, layer, args.images, args.num_workers))
        text = report(out, sweep, results, args.seeds)
        write_results(out, sweep, dict(seeds=args.seeds, results=results), text)
    print(f'Figures are beside them ({time.monotonic() - start:.0f} s).')


if __name__ == '__main__':
    try:
        run(main)
    except KeyboardInterrupt:
        sys.exit('Interrupted; the same command goes on from the last epoch.')
