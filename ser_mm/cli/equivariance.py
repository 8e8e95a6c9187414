r"""Equivariance of every layer: R2 of moved token maps, and how often a token is found again.

Each checkpoint belongs to the config before it:

    ser-mm equivariance mocov3_vits16 BASELINE.pth ser_mocov3_vits16 SER.pth
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed

from ser_mm.cli._arguments import (
    add_cfg_options,
    add_data,
    add_reading,
    check_writable,
    make_parser,
    one_sentence,
    place,
    positive,
    use_data,
)
from ser_mm.engine.configs import find_config, is_config
from ser_mm.engine.options import set_options
from ser_mm.evaluation.backbone import build_backbone, start_of, token_maps_of
from ser_mm.evaluation.data import check_evaluation, spaced_images
from ser_mm.evaluation.equivariance import (
    TRANSFORMATIONS,
    equivariance_by_layer,
    equivariance_curves,
    report_equivariance,
)
from ser_mm.evaluation.results import write_results
from ser_mm.visualization import draw_curves


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('equivariance', __doc__)
    parser.add_argument(
        'networks',
        nargs='+',
        metavar='CONFIG CHECKPOINT [CHECKPOINT ...]',
        help='config with `evaluation` (a path, or the name of a shipped one), its checkpoints, '
        'the next config, its checkpoints, ...',
    )
    parser.add_argument(
        '--names',
        nargs='+',
        help='names of the checkpoints in tables and curves (default: their folders)',
    )
    parser.add_argument(
        '--images',
        type=positive(int),
        default=500,
        help='validation images, at most (default: 500)',
    )
    add_reading(parser)
    parser.add_argument(
        '--transformations',
        nargs='+',
        choices=TRANSFORMATIONS,
        default=TRANSFORMATIONS,
        help='transformations to score the maps under (default: all)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of the untrained networks (default: 0)'
    )
    parser.add_argument(
        '--out',
        type=place,
        default=Path('work_dirs/equivariance'),
        help='folder of the results (default: %(default)s)',
    )
    add_data(parser, 'to move, without labels', val=False)
    add_cfg_options(parser, 'override fields of the configs, e.g. evaluation.val.indices=100')
    args = parser.parse_args(argv)
    args.pairs = []
    for item in args.networks:
        if is_config(item):
            config = item
        elif item is args.networks[0]:
            parser.error(f'{item} comes first, but is not a config that it would belong to.')
        else:
            args.pairs.append((config, item))
    if not args.pairs:
        parser.error(f'no checkpoint follows {args.networks[-1]}; name one.')
    folders = [Path(checkpoint).absolute().parent.name for _, checkpoint in args.pairs]
    if len(set(folders)) < len(folders):
        folders = [checkpoint for _, checkpoint in args.pairs]
    args.names = args.names or folders
    if len(set(args.names)) != len(args.pairs):
        parser.error(f'--names needs {len(args.pairs)} different names, one per checkpoint.')
    return args


def _short(config: str, configs: Iterable[str]) -> str:
    """The name of a config without its folder, if that tells it from the others."""
    name = Path(config).stem
    return name if [Path(x).stem for x in configs].count(name) == 1 else config


@one_sentence()
def main(argv: Sequence[str] | None = None) -> None:
    """Score, print the table, draw the curves.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel('WARNING')
    cfgs = {config: Config.fromfile(find_config(config)) for config, _ in args.pairs}
    for cfg in cfgs.values():
        use_data(cfg, args, False, ['val'])
        set_options(cfg, args.cfg_options)
        check_evaluation(cfg, ['val'], labelled=False)
    check_writable('--out', args.out)
    networks = {}
    for name, (config, checkpoint) in zip(args.names, args.pairs, strict=True):
        before = start_of(cfgs[config])
        before = f'{before}, {_short(config, cfgs)}' if len(cfgs) > 1 else before
        while before in args.names:  # a folder may be called weights, too
            before = f'{before} at the start'
        networks.setdefault(before, (config, None))
        networks[name] = (config, checkpoint)

    results = {}
    for name, (config, checkpoint) in networks.items():
        print(f'{name}: {args.images} images at most', flush=True)
        cfg = cfgs[config]
        init_default_scope(cfg.get('default_scope') or 'mmpretrain')
        set_random_seed(args.seed)
        backbone = build_backbone(cfg, checkpoint)
        batches = spaced_images(cfg, 'val', args.images, args.batch_size, args.num_workers)
        with token_maps_of(backbone) as token_maps:
            results[name] = equivariance_by_layer(token_maps, batches, args.transformations)

    settings = dict(networks=networks, images=args.images, torch=torch.__version__)
    text = report_equivariance(results)
    write_results(args.out, 'equivariance', {**settings, 'results': results}, text)
    draw_curves(
        equivariance_curves(results),
        args.out / 'equivariance.png',
        'block',
        len(args.transformations),
    )


if __name__ == '__main__':
    main()
