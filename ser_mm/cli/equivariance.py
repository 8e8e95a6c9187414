r"""Equivariance of every layer: R2 of moved token maps, and how often a token is found again.

Each checkpoint belongs to the config before it:

    python tools/equivariance.py configs/mocov3_vits16.py BASELINE.pth \
        configs/ser_mocov3_vits16.py SER.pth
"""

import argparse
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed

from ser_mm.cli._arguments import (
    check_evaluation,
    make_table,
    positive,
    run,
    write_results,
)
from ser_mm.evaluation import build_backbone
from ser_mm.evaluation.equivariance import (
    TRANSFORMATIONS,
    equivariance_by_layer,
    spaced_images,
    token_maps_of,
)
from ser_mm.visualization import draw_curves

TITLES = dict(r2='R2', retrieval='retrieval')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'networks',
        nargs='+',
        metavar='CONFIG CHECKPOINT [CHECKPOINT ...]',
        help='config with `evaluation`, its checkpoints, the next config, ...',
    )
    parser.add_argument('--names', nargs='+', help='of the checkpoints, in tables and curves')
    parser.add_argument(
        '--images', type=positive(int), default=500, help='validation images (default: 500)'
    )
    parser.add_argument('--batch-size', type=positive(int), default=64, help='default: 64')
    parser.add_argument('--num-workers', type=int, default=0, help='processes that read images')
    parser.add_argument(
        '--transformations', nargs='+', choices=TRANSFORMATIONS, default=TRANSFORMATIONS
    )
    parser.add_argument('--seed', type=int, default=0, help='of the untrained network')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/equivariance'))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override fields of the configs, e.g. evaluation.val.data_root=PATH',
    )
    args = parser.parse_args()
    args.pairs = []
    for item in args.networks:
        if item.endswith('.py'):
            config = item
        elif item is args.networks[0]:
            parser.error(f'{item} comes first, but is no config (.py) that it would belong to.')
        else:
            args.pairs.append((config, item))
    if not args.pairs:
        parser.error(f'no checkpoint follows {args.networks[-1]}; name one.')
    folders = [Path(checkpoint).parent.name for _, checkpoint in args.pairs]
    if len(set(folders)) < len(folders):
        folders = [checkpoint for _, checkpoint in args.pairs]
    args.names = args.names or folders
    if len(set(args.names)) != len(args.pairs):
        parser.error(f'--names needs {len(args.pairs)} different names, one per checkpoint.')
    return args


def main() -> None:
    """Score, print the table, draw the curves."""
    args = parse_args()
    MMLogger.get_current_instance().setLevel('WARNING')
    cfgs = {config: Config.fromfile(config) for config, _ in args.pairs}
    for cfg in cfgs.values():
        cfg.merge_from_dict(args.cfg_options)
        check_evaluation(cfg, ['val'])
    networks = {}
    for name, (config, checkpoint) in zip(args.names, args.pairs, strict=True):
        before = f'untrained, {Path(config).stem}' if len(cfgs) > 1 else 'untrained'
        networks.setdefault(before, (config, None))
        networks[name] = (config, checkpoint)

    results = {}
    for name, (config, checkpoint) in networks.items():
        print(f'{name}: {args.images} images at most', flush=True)
        cfg = cfgs[config]
        init_default_scope(cfg.get('default_scope') or 'mmpretrain')
        set_random_seed(args.seed)
        backbone = build_backbone(cfg, checkpoint)
        batches = spaced_images(cfg, 'val', args.images, args.batch_size, args.num_workers)
        with token_maps_of(backbone) as token_maps:
            results[name] = equivariance_by_layer(token_maps, batches, args.transformations)

    # Chance depends on the number of tokens, which networks may differ in.
    distinct = {}
    for name, scores in results.items():
        distinct[str([[x['chance'] for x in layers] for layers in scores.values()])] = name
    chances = {
        'chance' if len(distinct) == 1 else f'chance, {name}': results[name]
        for name in distinct.values()
    }
    shown = {'r2': results, 'retrieval': {**results, **chances}}
    panels, tables = {}, []
    for key, scored in shown.items():
        rows = []
        for moves in args.transformations:
            curves = panels[f'{TITLES[key]}, {moves}'] = {}
            for name, scores in scored.items():
                values = [layer['chance' if name in chances else key] for layer in scores[moves]]
                curves[name] = [(i + 1, value, 0.0) for i, value in enumerate(values)]
                rows.append([f'{moves}, {name}', *values])
        depth = max(map(len, rows)) - 1
        rows = [row + [''] * (depth + 1 - len(row)) for row in rows]
        tables.append(make_table([TITLES[key], *(f'block {i + 1}' for i in range(depth))], rows))
    text = '\n\n'.join(tables)
    settings = dict(networks=networks, images=args.images, torch=torch.__version__)
    write_results(args.out, 'equivariance', {**settings, 'results': results}, text)
    draw_curves(panels, args.out / 'equivariance.png', 'block', len(args.transformations))


if __name__ == '__main__':
    run(main)
