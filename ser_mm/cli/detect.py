r"""Train detectors on your images and boxes, on pretrained backbones, and compare them.

The classes are the categories of the annotation files, in COCO's format. For every backbone, frozen
and trained with the detector, and every share of the labelled images, a detector is trained from
each seed, by as many steps. One table has the mAP of all, with intervals and the differences to
the first backbone:

    ser-mm detect coco/faster-rcnn_vits16 --train train.json --val val.json --images FOLDER \
        --backbones baseline=mocov3.pth SER=ser.pth --scratch --shares 0.01 0.1 1 --seeds 0 1 2

Finished runs are kept and interrupted ones go on: run the same command again, also with more
backbones, shares or seeds.
"""

import argparse
from collections.abc import Sequence

from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_runs_arguments,
    check_writable,
    make_parser,
    one_sentence,
    place,
    positive,
)
from ser_mm.cli.demo import INTERRUPTED
from ser_mm.engine.operators import read_config
from ser_mm.engine.options import resolve_options
from ser_mm.experiments.detection import MODES, compare_detectors


def _backbone(text: str) -> tuple[str, str]:
    """A type for argparse: NAME=CHECKPOINT."""
    name, found, checkpoint = text.partition('=')
    if not (name and found and checkpoint):
        raise argparse.ArgumentTypeError(f'{text}: give NAME=CHECKPOINT')
    return name, checkpoint


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('detect', __doc__)
    parser.add_argument('config', help=f'{CONFIG_HELP}, of a detector (configs/coco)')
    for split, what in dict(train='train', val='score').items():
        parser.add_argument(
            f'--{split}',
            type=place,
            required=True,
            metavar='JSON',
            help=f"annotations to {what} on, in COCO's format",
        )
    parser.add_argument(
        '--images',
        type=place,
        required=True,
        metavar='FOLDER',
        help='folder that the names of images in both files start from',
    )
    parser.add_argument(
        '--val-images', type=place, metavar='FOLDER', help='that of --val, if it is another'
    )
    parser.add_argument(
        '--backbones',
        type=_backbone,
        nargs='+',
        required=True,
        metavar='NAME=CHECKPOINT',
        help='pretrained backbones; the others are compared with the first. {seed} in a path '
        'stands for the seed, where each has a pretraining of its own',
    )
    parser.add_argument(
        '--scratch',
        action='store_true',
        help='train from scratch too, and, as a floor, on a frozen random backbone',
    )
    parser.add_argument(
        '--modes',
        nargs='+',
        choices=MODES,
        default=MODES,
        help='whether backbones are frozen or trained with the detector (default: both)',
    )
    parser.add_argument(
        '--shares',
        type=positive(float),
        nargs='+',
        default=[1.0],
        metavar='SHARE',
        help='shares of the training images, up to 1, which are drawn by the seed, the smaller in '
        'the larger (default: 1)',
    )
    add_runs_arguments(parser, 'work_dirs/detect')
    args = parser.parse_args(argv)
    names = [name for name, _ in args.backbones]
    if twice := next((name for name in names if names.count(name) > 1), None):
        parser.error(f'--backbones: {twice} stands twice; give each a name of its own.')
    return args


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Train, score, print the table.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('--work-dir', args.work_dir)
    MMLogger.get_instance('detect', log_level='WARNING')
    compare_detectors(
        args.config,
        args.train,
        args.val,
        args.images,
        dict(args.backbones),
        args.work_dir,
        val_images=args.val_images,
        scratch=args.scratch,
        modes=args.modes,
        shares=args.shares,
        seeds=args.seeds,
        cfg_options=resolve_options(read_config(args.config), args.cfg_options),
        jobs=args.jobs,
        gpus=args.gpus,
    )


if __name__ == '__main__':
    main()
