r"""What the token maps of a frozen backbone are good for.

Correspondence of tokens under known warps, accuracy against angle, how well the place of a token
can be read from it, and segmentation of images with masks, block by block:

    ser-mm dense ser_mocov3_vits16 work_dirs/ser_mocov3_vits16/epoch_100.pth

A measure that is finished is kept beside --out: the same command continues where it was
interrupted. Several processes divide the measures among them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dist import is_main_process

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_cfg_options,
    add_data,
    add_launcher,
    add_reading,
    load_config,
    make_parser,
    one_sentence,
    place,
    positive,
)
from ser_mm.engine.cpu import close_process_group
from ser_mm.evaluation.dense import MEASURES, check_measures, measure_dense, report_dense
from ser_mm.evaluation.results import write_results


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('dense', __doc__)
    parser.add_argument('config', help=f'{CONFIG_HELP}, with `evaluation`')
    parser.add_argument(
        'checkpoint', nargs='?', help='its weights (default: none, the untrained network)'
    )
    parser.add_argument(
        '--measures',
        nargs='+',
        choices=MEASURES,
        help='what to measure (default: all, segmentation where --masks is given)',
    )
    parser.add_argument(
        '--masks',
        type=place,
        help='of segmentation, folder with train/images, train/masks, val/images and val/masks: a '
        'PNG for each image with the class of each pixel, 255 for none',
    )
    parser.add_argument(
        '--layers',
        nargs='+',
        type=positive(int),
        help='blocks of a ViT, or stages of a ResNet, counted from 1 (default: all); not '
        'of angle, which takes the final representation',
    )
    parser.add_argument(
        '--images',
        type=positive(int),
        default=200,
        help='validation images, at most (default: 200)',
    )
    parser.add_argument(
        '--train-images',
        type=positive(int),
        default=5000,
        help='training images, at most, of the probes of angle and position (default: 5000)',
    )
    parser.add_argument(
        '--step',
        type=positive(float),
        default=15,
        help='degrees between two angles, from 0 to 360 (default: 15)',
    )
    parser.add_argument(
        '--affine',
        type=positive(int),
        default=8,
        help='warps with scale and shift that are drawn, of correspondence (default: 8)',
    )
    parser.add_argument(
        '--within',
        type=positive(float),
        default=1.0,
        help='tokens that a match may be away from its place, of correspondence (default: 1)',
    )
    parser.add_argument(
        '--seed',
        type=int,
        default=0,
        help='seed of an untrained network and of the warps that are drawn (default: 0)',
    )
    add_reading(parser)
    parser.add_argument(
        '--out',
        type=place,
        default=Path('work_dirs/dense.json'),
        help='JSON file of the results; the tables are beside it in Markdown '
        '(default: %(default)s)',
    )
    add_data(parser, 'to evaluate with')
    add_cfg_options(parser, 'override fields of the config, e.g. evaluation.val.indices=100')
    add_launcher(parser)
    # The checkpoint may come after options, as tools/dist_train.sh puts it; where it may be left
    # out, parse_args looks for it beside the config only.
    args = parser.parse_intermixed_args(argv)
    if args.out.suffix != '.json':
        parser.error(f'--out {args.out}: name a file that ends in .json.')
    try:
        args.measures = check_measures(args.measures, args.masks)
    except ValueError as error:
        parser.error(f'--{error}')
    return args


@one_sentence(interrupted='Interrupted; the same command continues with what is not measured yet.')
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON, print the tables.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    labelled = 'angle' in args.measures
    splits = ['train', 'val'] if {'angle', 'position'} & set(args.measures) else ['val']
    cfg = load_config(args.config, args, splits, labelled, file=True)
    names = ('images', 'train_images', 'step', 'affine', 'within', 'seed')
    settings = {name: getattr(args, name) for name in names}
    found = measure_dense(
        cfg,
        args.checkpoint,
        args.measures,
        args.layers,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        masks=args.masks,
        keep=args.out.with_suffix(''),
        **settings,
    )
    if is_main_process():
        about = dict(config=args.config, checkpoint=args.checkpoint, torch=torch.__version__)
        settings['masks'] = args.masks and str(args.masks)
        results = {**about, **settings, 'results': found}
        write_results(args.out.parent, args.out.stem, results, report_dense(found))
    close_process_group()


if __name__ == '__main__':
    main()
