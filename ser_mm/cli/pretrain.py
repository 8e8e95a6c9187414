"""Pretrain a backbone on a folder of images with SER, and show what it learned.

Any folder does, flat or with sub-folders, with or without labels. The same command resumes what was
interrupted. In --out are then:

    run.py         the config of the run; a copy can be edited, for `ser-mm train --work-dir OTHER`
    run/           checkpoints and logs
    report.html    losses, views, token maps and nearest neighbours; k-NN and a linear probe where
                   sub-folders are classes
    figures.json   the figures of that page
    timm/          where timm is installed, the backbone for it, which needs nothing of this package
"""

import argparse
from collections.abc import Sequence

from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    add_data,
    check_writable,
    make_parser,
    one_sentence,
    place,
    positive,
    workers,
)
from ser_mm.cli.demo import INTERRUPTED
from ser_mm.experiments.pretrain import pretrain
from ser_mm.experiments.recipes import BACKBONES, METHODS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('pretrain', __doc__)
    add_data(parser, 'to train on', required=True)
    parser.add_argument('--out', type=place, required=True, help='folder of the results')
    parser.add_argument(
        '--model',
        default='vit_small_patch16',
        metavar='MODEL',
        help=f'backbone: {", ".join(BACKBONES)}, or timm/NAME (default: %(default)s)',
    )
    parser.add_argument(
        '--method',
        default='mocov3',
        metavar='METHOD',
        help=f'algorithm that SER is added to: {", ".join(METHODS)} (default: %(default)s)',
    )
    parser.add_argument(
        '--weights', type=place, help='checkpoint that the backbone starts from (default: none)'
    )
    parser.add_argument(
        '--image-size',
        type=positive(int),
        default=224,
        help='side of the views in pixels (default: %(default)s)',
    )
    parser.add_argument(
        '--batch-size',
        type=positive(int),
        help='images per step of all devices together (default: 256 a GPU or 64 a CPU process, an '
        'eighth of the images where they are few)',
    )
    parser.add_argument('--epochs', type=positive(int), default=100, help='(default: %(default)s)')
    parser.add_argument(
        '--devices',
        type=positive(int),
        help='GPUs, or CPU processes where there is none (default: all GPUs, or one process)',
    )
    parser.add_argument(
        '--num-workers',
        type=workers,
        help='additional processes that read images, for each device (default: by the cores)',
    )
    parser.add_argument(
        '--channels',
        type=positive(int),
        help='of images: 1 for a network of grey images, 4 to have what else is left out as '
        'transparency (default: three for grey and colours, otherwise as many as images have)',
    )
    parser.add_argument('--seed', type=int, default=0, help='(default: 0)')
    return parser.parse_args(argv)


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, evaluate, draw.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = vars(parse_args(argv))
    check_writable('--out', args['out'])
    MMLogger.get_instance('pretrain', log_level='WARNING')
    pretrain(**args)


if __name__ == '__main__':
    main()
