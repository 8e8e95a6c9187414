"""Sweep the settings of SER: train, evaluate, and draw with error bars over seeds.

Sweeps:
    layer        SER after block 1, 2, ..., [CLS] with it (at the last block, one before)
    cls          [CLS] after block 0, 1, ..., SER where the config has it
    equi_ratio, temperature, loss_weight
                 the config's value times 1/4, 1/2, 1, 2, 4
    gradient     the base algorithm, SER with its gradient cut (the same views), SER
    addons       the base algorithm, SER, and AugSelf, EquiMod, STL and E-SSL, as their authors have
                 them and moved to SER's block, with their controls, and what each costs

Points that sweeps have in common are trained once. Finished runs are not trained again,
interrupted ones resume: run the same command again. At full scale:

    ser-mm ablate layer cls --config ser_mocov3_vits16 --gpus 8
"""

import argparse
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.logging import MMLogger

from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_experiment_arguments,
    check_writable,
    finite,
    make_parser,
    one_sentence,
    positive,
)
from ser_mm.cli.demo import INTERRUPTED
from ser_mm.engine.configs import find_config
from ser_mm.engine.options import resolve_options
from ser_mm.experiments.sweeps import SWEEPS, run_sweeps


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('ablate', __doc__)
    parser.add_argument(
        'sweeps',
        nargs='+',
        choices=[*SWEEPS, 'all'],
        metavar='SWEEP',
        help='sweeps to run, or all, which is all but addons',
    )
    parser.add_argument(
        '--config', default='demo/ser_mocov3', help=f'{CONFIG_HELP} (default: %(default)s)'
    )
    parser.add_argument(
        '--values',
        nargs='+',
        type=finite,
        help='values of the setting, for one sweep (default: those above)',
    )
    parser.add_argument(
        '--images',
        type=positive(int),
        default=450,
        help='validation images that R2 is measured on, at most (default: 450)',
    )
    add_experiment_arguments(parser, 'work_dirs/ablate')
    args = parser.parse_args(argv)
    # Other methods are there for some algorithms only.
    everything = tuple(x for x in SWEEPS if x != 'addons')
    args.sweeps = everything if 'all' in args.sweeps else tuple(dict.fromkeys(args.sweeps))
    if args.values and (len(args.sweeps) != 1 or args.sweeps[0] in ('gradient', 'addons')):
        parser.error('--values needs one sweep that has values.')
    return args


@one_sentence(interrupted=INTERRUPTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Train all points, evaluate, print tables, draw.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    check_writable('--work-dir', args.work_dir)
    MMLogger.get_instance('ablate', log_level='WARNING')
    config = find_config(args.config)
    cfg_options = resolve_options(Config.fromfile(config), args.cfg_options)
    run_sweeps(
        config,
        args.sweeps,
        args.seeds,
        args.work_dir,
        cfg_options,
        values=args.values,
        jobs=args.jobs,
        gpus=args.gpus,
        images=args.images,
        num_workers=args.num_workers,
        solver=args.solver,
    )


if __name__ == '__main__':
    main()
