"""Write a trained backbone so that timm, torchvision, MMPretrain or ONNX loads it without ser_mm.

    ser-mm export ser_mocov3_vits16 epoch_100.pth out/timm
    hf upload USER/NAME out/timm        # push the folder to a hub

For timm OUT is a folder: timm.create_model('local-dir:OUT', pretrained=True, num_classes=0) gives
the features, and timm.data.resolve_model_data_config what the images are to be. For the others OUT
is a file: for ONNX, a program that gives the features of any number of images. The features are
compared before anything is written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_cfg_options,
    check_writable,
    make_parser,
    one_sentence,
    place,
)
from ser_mm.engine.configs import find_config
from ser_mm.engine.options import set_options
from ser_mm.evaluation.export import LIBRARIES, export_backbone


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('export', __doc__)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help='checkpoint of this config, or one of its backbone')
    parser.add_argument(
        'out', type=place, help='folder for timm, otherwise a file (.safetensors or another)'
    )
    parser.add_argument(
        '--to',
        choices=LIBRARIES,
        default='timm',
        help='what is to load it; torchvision has ResNets only, onnx is for any backbone (default: '
        '%(default)s)',
    )
    add_cfg_options(parser, 'override fields of the config, e.g. evaluation.prefix=teacher.')
    return parser.parse_args(argv)


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Convert, compare, write, and print how it is loaded.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    MMLogger.get_instance('export', log_level='WARNING')
    cfg = Config.fromfile(find_config(args.config))
    set_options(cfg, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    check_writable('OUT', Path(args.out).parent)
    usage = export_backbone(cfg, args.checkpoint, args.out, args.to)
    print(f'Written to {args.out}. To load it:\n\n{usage}')


if __name__ == '__main__':
    main()
