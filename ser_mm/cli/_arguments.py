"""What the evaluation tools have in common: arguments, start, tables and files of results."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError

from mmengine.config import Config, DictAction
from mmengine.dist import (
    broadcast_object_list,
    get_rank,
    init_dist,
    is_distributed,
    is_main_process,
)
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.utils.dl_utils import set_multi_processing
from torch import Tensor, nn

from ser_mm.engine.runtime import (
    close_process_group,
    get_local_rank,
    init_cpu_process_group,
)

from .features import load_features
from .probe import LEARNING_RATES, select_linear_head

# Seconds that ranks wait for the one that fits a head.
_PATIENCE = 6 * 3600


def positive(number: type) -> Callable[[str], float]:
    """A type for argparse: an ``int`` or a ``float`` that is greater than 0."""

    def parse(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'{text} is not positive')
        return value

    parse.__name__ = f'positive {number.__name__}'  # what argparse calls it
    return parse


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments that all evaluations of features take.

    Args:
        parser (argparse.ArgumentParser): Has those of the tool already.
        out (str): Default folder of the results.
    """
    parser.add_argument('--out', type=Path, default=Path(out), help=f'results (default: {out})')
    parser.add_argument(
        '--blocks',
        type=positive(int),
        default=1,
        help='last blocks whose [CLS] tokens make a feature: 1 as in MoCo v3 (default), 4 as in '
        'DINO; of a network without [CLS], the last map is averaged',
    )
    parser.add_argument(
        '--cache-dir',
        type=Path,
        default=Path('work_dirs/features'),
        help='features that are extracted already (default: %(default)s)',
    )
    parser.add_argument('--batch-size', type=positive(int), default=256, help='images per process')
    parser.add_argument('--num-workers', type=int, default=0, help='processes that read images')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override fields of the config, e.g. evaluation.val.data_root=PATH',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help='set by launcher')


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the linear probe."""
    parser.add_argument(
        '--epochs', type=positive(int), default=50, help='of the linear probe (default: 50)'
    )
    parser.add_argument(
        '--probe-batch', type=positive(int), default=256, help='features per step (default: 256)'
    )
    parser.add_argument(
        '--lrs',
        type=positive(float),
        nargs='+',
        default=LEARNING_RATES,
        help='learning rates of the sweep, times --probe-batch / 256 (default: 0.001 to 10)',
    )


def fit_head(
    cfg: Config, checkpoint: str, args: argparse.Namespace
) -> tuple[nn.Linear, dict, tuple[Tensor, Tensor] | None]:
    """The linear probe that the command line asks for, the same on all ranks.

    Args:
        cfg (Config): Config of a run.
        checkpoint (str): Its weights.
        args (argparse.Namespace): With what :func:`add_arguments` and :func:`add_probe_arguments`
            add.

    Returns:
        tuple: The head, its choice (see :func:`~ser_mm.evaluation.select_linear_head`), and the
        training features and labels, None on all ranks but the first.
    """
    train = load_features(cfg, checkpoint, 'train', **feature_options(args), main_only=True)
    found = [None]
    if is_main_process():
        sweep = args.lrs, args.epochs, args.probe_batch
        found = [select_linear_head(*train, args.cache_dir, *sweep)]
    broadcast_object_list(found)
    return *found[0], train


def load_config(args: argparse.Namespace, splits: Sequence[str] = ('train', 'val')) -> Config:
    """Load and check the config, and join the other processes.

    Args:
        args (argparse.Namespace): With ``config`` and what :func:`add_arguments` adds.
        splits (Sequence[str]): Keys of ``evaluation`` that will be used.

    Returns:
        Config: With the options of the command line.

    Raises:
        FileNotFoundError: If data is missing.
        ValueError: See :func:`check_evaluation`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    MMLogger.get_current_instance().setLevel('WARNING')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    if get_local_rank(args.launcher) == 0:
        check_evaluation(cfg, splits)
    processes = (cfg.get('env_cfg') or {}).get('mp_cfg') or {}
    set_multi_processing(**processes, distributed=args.launcher != 'none')
    if args.launcher != 'none' and not is_distributed():
        init_cpu_process_group(args.launcher, _PATIENCE) or init_dist(
            args.launcher, timeout=_PATIENCE
        )
    return cfg


def feature_options(args: argparse.Namespace) -> dict:
    """What the command line says to :func:`~ser_mm.evaluation.load_features`."""
    names = ('cache_dir', 'blocks', 'batch_size', 'num_workers')
    return {name: getattr(args, name) for name in names}


def run(main: Callable[[], None]) -> None:
    """Run a tool; what is wrong with its input becomes one sentence.

    Args:
        main (Callable): The tool.
    """
    try:
        main()
    except (ImportError, OSError, ValueError, UnpicklingError) as error:
        sys.exit(f'error{f" on rank {get_rank()}" if is_distributed() else ""}: {error}')
    close_process_group()
