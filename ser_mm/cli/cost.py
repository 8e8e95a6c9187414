"""What SER adds to a training step: FLOPs, operators and parameters of a config and its baseline.

The FLOPs are counted without running the step: 256 images of ViT-B/16 need no GPU. With --measure
the step is run too, for its time and, on a GPU, its memory.

    python tools/cost.py configs/ser_mocov3_vits16.py
"""

import argparse
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import run
from ser_mm.evaluation.cost import TrainingStep, count_step, take_turns

PARTS = {
    'b2': 'images of b2 in the network, in place of as many of b1',
    'neck': 'SERNeck and rho',
    'loss': 'SER loss',
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', type=Path, help='config of a run')
    parser.add_argument(
        '--baseline',
        type=Path,
        help='config to compare with (default: the one without ser_ in its name, beside it)',
    )
    parser.add_argument('--batch-size', type=int, default=256, help='images (default: 256)')
    parser.add_argument('--measure', action='store_true', help='run steps, for time and memory')
    parser.add_argument('--steps', type=int, default=10, help='measured steps (default: 10)')
    parser.add_argument('--out', type=Path, help="default: work_dirs/cost/ and the config's name")
    args = parser.parse_args()
    args.baseline = args.baseline or args.config.with_name(args.config.name.removeprefix('ser_'))
    for name in ('config', 'baseline'):
        if not getattr(args, name).is_file():
            parser.error(f'{name} {getattr(args, name)} is not there; name another config.')
    if args.baseline == args.config:
        parser.error(f'{args.config} has no baseline by its name; name one with --baseline.')
    if args.batch_size < 2 or args.steps < 1:
        parser.error('--batch-size must be at least 2, and --steps at least 1.')
    args.out = args.out or Path('work_dirs/cost', f'{args.config.stem}.json')
    return args


def main() -> None:
    """Count, print tables, and write JSON."""
    args = parse_args()
    MMLogger.get_instance('cost', log_level='ERROR')
    cfgs = {name: Config.fromfile(getattr(args, name)) for name in ('baseline', 'config')}
    init_default_scope(cfgs['config'].get('default_scope', 'mmpretrain'))
    rows = {name: count_step(cfg, args.batch_size) for name, cfg in cfgs.items()}
    if args.measure:
        runs = {name: TrainingStep(cfg, args.batch_size) for name, cfg in cfgs.items()}
        for name, row in take_turns(runs, args.steps).items():
            rows[name].update(row)
    baseline, config = rows.values()

    views = ', '.join(f'{height} x {width}' for height, width in config['views'])
    print(f'A step of {args.batch_size} images, views of {views}; {config["b2"]:g} images in b2\n')
    print(f'| | {args.baseline.stem} | {args.config.stem} | ratio |\n|---|--:|--:|--:|')
    formats = {
        'flops': ('GFLOPs', lambda x: f'{x / 1e9:,.1f}'),
        'operators': ('operators', '{:,}'.format),
        'parameters': ('parameters, all branches', '{:,}'.format),
        'trainable': ('trainable parameters', '{:,}'.format),
        'seconds': ('seconds', '{:.4f}'.format),
        'memory': ('MiB, peak', lambda x: f'{x / 2**20:,.0f}'),
    }
    for key, (title, form) in formats.items():
        if config.get(key) is not None:
            a, b = baseline[key], config[key]
            print(f'| {title} | {form(a)} | {form(b)} | {b / a:.4f} |')
    if config['parts']:
        parts = dict(config['parts'])
        differences = {
            'without b2, against the baseline ([CLS] later)': parts['without_b2']
            - baseline['flops'],
            **{title: parts[key] for key, title in PARTS.items()},
            'in all': config['flops'] - baseline['flops'],
        }
        print('\n| where the difference is | GFLOPs | of the baseline |\n|---|--:|--:|')
        for title, flops in differences.items():
            print(f'| {title} | {flops / 1e9:+,.2f} | {flops / baseline["flops"]:+.4%} |')
        config['ratio_without_late_cls'] = config['flops'] / parts['without_b2']
        print(
            f'\nAgainst a baseline with the same [CLS]: {config["ratio_without_late_cls"]:.4f}. '
            'Counted: matrix products, convolutions and attention, forward and backward. Not\n'
            'counted: what works element by element, which moving maps by rho (grid_sample) is too.'
        )
    about = dict(
        config=str(args.config),
        baseline=str(args.baseline),
        batch_size=args.batch_size,
        torch=torch.__version__,
        device=get_device() if args.measure else None,
        flops_ratio=config['flops'] / baseline['flops'],
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(about=about, rows=rows), indent=1))
    print(f'\nWritten to {args.out}.')


if __name__ == '__main__':
    run(main)
