"""Features of all images of a folder, or of a list, in one file with the names of the images.

    ser-mm embed ser_mocov3_vits16 epoch_100.pth --data "my images" --out features.npy
    ser-mm embed out/run.py out/run/epoch_100.pth --data "my images" --out features.parquet

The second line takes what `ser-mm pretrain --out out` leaves. Rows are in the order of the names,
which are paths relative to --data (those of a list in its own order). The file is

    .npy          the array of features (N, C), with the names beside it in .names.json
    .safetensors  the tensor "features", with the names as JSON in its metadata
    .parquet      the columns "name" and "feature"; needs pyarrow

It is written whole or not at all. After an interruption the same command extracts the rest.
CUDA_VISIBLE_DEVICES chooses the GPU, and none if it is empty; --launcher takes several.
"""

import argparse
from collections.abc import Sequence

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    about_option,
    add_data,
    add_extraction_arguments,
    check_writable,
    feature_options,
    load_config,
    make_parser,
    one_sentence,
    place,
    positive,
)
from ser_mm.datasets.image_source import check_images
from ser_mm.engine.cpu import close_process_group
from ser_mm.evaluation.embedding import check_format, embed_folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('embed', __doc__)
    parser.add_argument('config', help=f'{CONFIG_HELP}; with the transforms of an evaluation')
    parser.add_argument('checkpoint', help='checkpoint of this config, or one of its backbone')
    add_data(parser, 'to embed, all of them', val=False, required=True)
    parser.add_argument(
        '--out', type=place, required=True, help='file to write: .npy, .safetensors or .parquet'
    )
    parser.add_argument(
        '--layer',
        type=positive(int),
        help='write the token map (C, h, w) after this block of a ViT, or this stage of a ResNet, '
        'in place of a vector',
    )
    add_extraction_arguments(parser)
    return parser.parse_args(argv)


@one_sentence(
    interrupted='Interrupted; features that were extracted are kept, and the same command extracts '
    'the rest.'
)
def main(argv: Sequence[str] | None = None) -> None:
    """Extract and write.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    with about_option('--out'):
        check_format(args.out, args.layer is not None)
    check_writable('--out', args.out, file=True)
    with about_option('--data'):
        check_images(args.data, 'all')
    cfg = load_config(args.config, args, splits=(), file=True)
    found = embed_folder(
        cfg, args.checkpoint, args.data, args.out, layer=args.layer, **feature_options(args)
    )
    if found is not None:
        features, names = found
        shape = ' x '.join(map(str, features.shape[1:]))
        print(f'{args.out}: {len(names)} images, {shape} each')
    close_process_group()


if __name__ == '__main__':
    main()
