"""What SER adds to a training step: FLOPs, operators and parameters of a config and its baseline.

The FLOPs are counted without running the step: 256 images of ViT-B/16 need no GPU. With --measure
the step is run too, for its time and, on a GPU, its memory.

    ser-mm cost ser_mocov3_vits16
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import CONFIG_HELP, check_writable, make_parser, one_sentence, place
from ser_mm.engine.configs import find_config
from ser_mm.evaluation.cost import TrainingStep, count_step, report_costs, take_turns
from ser_mm.files import write_text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('cost', __doc__)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument(
        '--baseline',
        help='config to compare with (default: the one beside it without ser_ in its name)',
    )
    parser.add_argument(
        '--batch-size', type=int, default=256, help='images of a step (default: 256)'
    )
    parser.add_argument(
        '--measure', action='store_true', help='also run steps, and measure time and memory'
    )
    parser.add_argument(
        '--steps', type=int, default=10, help='steps of each that --measure times (default: 10)'
    )
    parser.add_argument(
        '--out',
        type=place,
        help='JSON file of the results (default: in work_dirs/cost/, by the name of the config)',
    )
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.steps < 1:
        parser.error('--batch-size must be at least 2, and --steps at least 1.')
    for name in ('config', 'baseline'):
        if getattr(args, name):
            try:
                setattr(args, name, find_config(getattr(args, name)))
            except FileNotFoundError as error:
                parser.error(str(error))
    if args.baseline is None:
        args.baseline = args.config.with_name(args.config.name.removeprefix('ser_'))
        if args.baseline == args.config or not args.baseline.is_file():
            parser.error(f'{args.config} has no baseline by its name; name one with --baseline.')
    args.out = args.out or Path('work_dirs/cost', f'{args.config.stem}.json')
    return args


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Count, print tables, and write JSON.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('--out', args.out, file=True)
    MMLogger.get_instance('cost', log_level='ERROR')
    cfgs = {name: Config.fromfile(getattr(args, name)) for name in ('baseline', 'config')}
    init_default_scope(cfgs['config'].get('default_scope', 'mmpretrain'))
    rows = {name: count_step(cfg, args.batch_size) for name, cfg in cfgs.items()}
    if args.measure:
        runs = {name: TrainingStep(cfg, args.batch_size) for name, cfg in cfgs.items()}
        for name, row in take_turns(runs, args.steps).items():
            rows[name].update(row)
    baseline, config = rows.values()

    print(f'A step of {args.batch_size} images.', end=' ')
    print(report_costs(config, baseline, args.config.stem, args.baseline.stem))
    about = dict(
        config=str(args.config),
        baseline=str(args.baseline),
        batch_size=args.batch_size,
        torch=torch.__version__,
        device=get_device() if args.measure else None,
        flops_ratio=config['flops'] / baseline['flops'],
    )
    write_text(args.out, json.dumps(dict(about=about, rows=rows), indent=1))
    print(f'\nWritten to {args.out}.')


if __name__ == '__main__':
    main()
