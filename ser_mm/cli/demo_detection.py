"""Train a detector on the frozen backbones of the demo, at toy scale, and compare.

The data are handwritten digits on photographs, as a COCO data set with boxes and masks; training
and validation share neither a digit nor a photograph. From each seed, the same Mask R-CNN is
trained on each backbone: a random one and those of the pretraining demo, which has to be run
before (make demo). Trained detectors are not trained again, interrupted ones resume: run the same
command again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    Once,
    add_cfg_options,
    check_writable,
    make_parser,
    one_sentence,
    place,
)
from ser_mm.cli.demo import INTERRUPTED
from ser_mm.engine.operators import read_config
from ser_mm.engine.options import resolve_options
from ser_mm.experiments.demo import algorithms
from ser_mm.experiments.demo_detection import run_detection


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('demo-detection', __doc__)
    parser.add_argument(
        '--algorithm',
        choices=algorithms(),
        default='mocov3',
        help='algorithm of the demo whose backbones are compared (default: mocov3)',
    )
    parser.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        action=Once,
        default=[0],
        help='seeds of the demo, which the detectors are trained from too (default: 0)',
    )
    parser.add_argument(
        '--pretrained',
        type=place,
        default=Path('work_dirs/demo'),
        help='--work-dir of the demo (default: %(default)s)',
    )
    parser.add_argument(
        '--work-dir',
        type=place,
        default=Path('work_dirs/demo_detection'),
        help='folder of data, runs and results (default: %(default)s)',
    )
    add_cfg_options(parser, 'override fields of the config of all detectors')
    return parser.parse_args(argv)


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Write the data, train, print the table, draw.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('--work-dir', args.work_dir)
    MMLogger.get_instance('demo', log_level='WARNING')
    cfg_options = resolve_options(read_config('demo/detection'), args.cfg_options)
    run_detection(args.algorithm, args.seeds, args.pretrained, args.work_dir, cfg_options)


if __name__ == '__main__':
    main()
