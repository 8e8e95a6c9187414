"""Pretrain with and without SER at toy scale, evaluate, and draw what happened.

From each seed, three arms are trained: the base algorithm (baseline) and SER side by side, then
SER with its loss weighted 0 (views only), which tells what the added views do by themselves. A
first table comes before the last arm. Trained arms are not trained again, interrupted ones resume:
run the same command again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    Once,
    add_cfg_options,
    check_writable,
    make_parser,
    one_sentence,
    place,
)
from ser_mm.engine.configs import find_config
from ser_mm.engine.options import resolve_options
from ser_mm.experiments.demo import algorithms, run_demo

INTERRUPTED = 'Interrupted; the same command continues from the last epoch.'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('demo', __doc__)
    parser.add_argument(
        '--algorithm',
        choices=algorithms(),
        default='mocov3',
        help='algorithm that SER is added to (default: mocov3)',
    )
    parser.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        action=Once,
        default=[0],
        help='seeds; each trains all arms, and the table has mean and deviation (default: 0)',
    )
    parser.add_argument(
        '--work-dir',
        type=place,
        default=Path('work_dirs/demo'),
        help='folder of runs and results (default: %(default)s)',
    )
    parser.add_argument(
        '--epochs', type=int, help='epochs of each run, at least 2 (default: those of the config)'
    )
    add_cfg_options(parser, 'override fields of the configs of all arms')
    args = parser.parse_args(argv)
    if args.epochs is not None:
        if args.epochs < 2:
            parser.error('--epochs must be at least 2: the first one is the warm-up.')
        args.cfg_options = {'train_cfg.max_epochs': args.epochs, **args.cfg_options}
    return args


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print the tables, draw.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('--work-dir', args.work_dir)
    MMLogger.get_instance('demo', log_level='WARNING')
    cfg = Config.fromfile(find_config(f'demo/ser_{args.algorithm}'))
    cfg_options = resolve_options(cfg, args.cfg_options)
    run_demo(args.algorithm, args.seeds, args.work_dir, cfg_options)


if __name__ == '__main__':
    main()
