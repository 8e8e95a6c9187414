"""Write the boxes of Tiny ImageNet as annotation files in COCO's format, for detection.

FOLDER/train.json and FOLDER/val.json name the images where they are. Run the same command again
and files that are there are left as they are.
"""

import argparse
from collections.abc import Sequence

from ser_mm.cli._arguments import check_writable, make_parser, one_sentence, place, positive
from ser_mm.datasets import write_tiny_imagenet_boxes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('boxes', __doc__)
    parser.add_argument('data', type=place, help='folder of the data set, tiny-imagenet-200')
    parser.add_argument('folder', type=place, metavar='FOLDER', help='folder of the files')
    for split, what in dict(train='train', val='validate').items():
        parser.add_argument(
            f'--{split}',
            type=positive(int),
            metavar='N',
            help=f'images of each class to {what} on, the first ones (default: all)',
        )
    parser.add_argument(
        '--all-classes',
        action='store_true',
        help="a category for each class (default: one for all, 'object')",
    )
    return parser.parse_args(argv)


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the files and say what is in them.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('FOLDER', args.folder)
    counts = write_tiny_imagenet_boxes(
        args.data, args.folder, args.train, args.val, not args.all_classes
    )
    for split, count in counts.items():
        print(
            f'{args.folder / split}.json: {count["images"]} images, and {count["left_out"]} left '
            'out whose box has no area.'
        )


if __name__ == '__main__':
    main()
