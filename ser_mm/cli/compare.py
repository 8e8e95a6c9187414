"""Compare arms of an experiment: train each from several seeds, measure all, report differences.

Arms:
    untrained, baseline
    late_cls       the base algorithm with [CLS] inserted where SER's config has it
    views_only     SER of weight 0
    ser            SER
    ser_early_cls  SER with [CLS] before the first block
    supervised     the config supervised_... beside the baseline's

Measures are kept run by run: the same command goes on where it was interrupted, and other measures
are added by naming them too. Other arms and seeds join the results in --out, also from another
machine. Tables alone, of results that are there:

    ser-mm compare --tables docs/results/tiny_imagenet/mocov3_tiny_imagenet_short.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_experiment_arguments,
    check_writable,
    make_parser,
    one_sentence,
    place,
    positive,
)
from ser_mm.cli.demo import INTERRUPTED
from ser_mm.engine.configs import find_config
from ser_mm.engine.options import resolve_options
from ser_mm.experiments.comparison import ARMS, compare
from ser_mm.experiments.differences import read_comparison, report_comparison
from ser_mm.experiments.measures import MEASURES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('compare', __doc__)
    parser.add_argument(
        '--config',
        default='tiny_imagenet/ser_mocov3_tiny_imagenet_short',
        help=f'{CONFIG_HELP}, with SER (default: %(default)s)',
    )
    parser.add_argument(
        '--arms',
        nargs='+',
        choices=ARMS,
        default=['untrained', 'baseline', 'late_cls', 'views_only', 'ser'],
        metavar='ARM',
        help='arms (default: untrained baseline late_cls views_only ser)',
    )
    parser.add_argument(
        '--measures',
        nargs='*',
        choices=MEASURES,
        default=MEASURES,
        metavar='MEASURE',
        help=f'what to measure, of {", ".join(MEASURES)}; nothing after it: train only '
        '(default: all)',
    )
    parser.add_argument(
        '--images',
        type=positive(int),
        default=1000,
        help='validation images of each corruption and of token maps, at most (default: 1000)',
    )
    parser.add_argument(
        '--train-images',
        type=positive(int),
        help='training images, at equal distances, of the probes (default: all)',
    )
    parser.add_argument(
        '--out',
        type=place,
        default=Path('work_dirs/compare/results'),
        help='folder of the results (default: %(default)s)',
    )
    parser.add_argument(
        '--tables', type=place, metavar='JSON', help='print the tables of these results, and end'
    )
    add_experiment_arguments(parser, 'work_dirs/compare')
    return parser.parse_args(argv)


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, report.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    if args.tables:
        print(report_comparison(read_comparison(args.tables, '--tables')))
        return
    check_writable('--work-dir', args.work_dir)
    check_writable('--out', args.out)
    MMLogger.get_instance('compare', log_level='WARNING')
    config = find_config(args.config)
    compare(
        config,
        list(dict.fromkeys(args.arms)),
        args.seeds,
        args.work_dir,
        args.out,
        resolve_options(Config.fromfile(config), args.cfg_options),
        measures=args.measures,
        jobs=args.jobs,
        gpus=args.gpus,
        images=args.images,
        train_images=args.train_images,
        num_workers=args.num_workers,
        solver=args.solver,
    )


if __name__ == '__main__':
    main()
