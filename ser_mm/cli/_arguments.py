"""What the commands have in common: arguments, start and end."""

import argparse
import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

from mmengine.config import Config
from mmengine.dist import get_rank, init_dist, is_distributed
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.utils.dl_utils import set_multi_processing
from torch.distributed import DistNetworkError

from ser_mm.checkpoint import guarded_checkpoints
from ser_mm.engine.configs import find_config
from ser_mm.engine.cpu import get_local_rank, init_cpu_process_group
from ser_mm.engine.images import use_images
from ser_mm.engine.options import set_options
from ser_mm.evaluation.data import check_evaluation
from ser_mm.evaluation.linear import LEARNING_RATES, SOLVABLE, SOLVERS
from ser_mm.experiments.runs import RunError

EXPECTED = (ImportError, OSError, ValueError, UnpicklingError, RunError, DistNetworkError)
"""Errors of the input or of the machine, which their message explains."""

CONFIG_HELP = 'path of a config file, or the name of a shipped config such as ser_mocov3_vits16'

_DENIED = {
    errno.EACCES: 'permission denied',
    errno.EPERM: 'permission denied',
    errno.EROFS: 'the file system is read-only',
}

# Seconds that ranks wait for the one that fits a head.
_PATIENCE = 6 * 3600


def positive(number: type) -> Callable[[str], float]:
    """A type for argparse: an ``int`` or a ``float`` that is greater than 0."""

    def parse(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'{text} is not positive')
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f'{text} is not finite')
        return value

    parse.__name__ = f'positive {number.__name__}'  # what argparse calls it
    return parse


def finite(text: str) -> float:
    """A type for argparse: a number, but neither infinite nor NaN."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f'{text} is not finite')
    return float(text)


def workers(text: str) -> int:
    """A type for argparse: a number of processes, 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f'{text} is negative; 0 is none but this process')
    return int(text)


def place(text: str) -> Path:
    """A type for argparse: a path, with a leading ``~`` expanded, as shells do not after ``=``."""
    return Path(text).expanduser()


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Parser of a command of ``ser-mm``, its description shown as it is written."""
    return argparse.ArgumentParser(
        prog=f'ser-mm {command}',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class Fields(argparse.Action):
    """Texts of KEY=VALUE by key; :func:`~ser_mm.engine.options.resolve_options` reads them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        odd = next((value for value in values if '=' not in value), None)
        if odd is not None:
            parser.error(f'{option_string} {odd}: give {self.metavar}.')
        given = dict(value.split('=', maxsplit=1) for value in values)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **given})


class Once(argparse.Action):
    """Values, each once, in the order in which they are named."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def add_cfg_options(parser: argparse.ArgumentParser, help: str) -> None:
    """Add ``--cfg-options``, a dict of fields of the config to override."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=Fields, default={}, metavar='KEY=VALUE', help=help
    )


def add_data(
    parser: argparse.ArgumentParser, what: str, val: bool = True, required: bool = False
) -> None:
    """Add ``--data``, which :func:`use_data` brings into a config.

    Args:
        parser (argparse.ArgumentParser): Of a command that trains or evaluates.
        what (str): What the images are for.
        val (bool): Add ``--val-data`` too. Defaults to True.
        required (bool): Whether there is no config that names others. Defaults to False.
    """
    instead = '' if required else ', in place of those of the config'
    parser.add_argument(
        '--data',
        type=place,
        required=required,
        metavar='PATH',
        help=f'images {what}{instead}: a folder (with train and val in it, if it has them), a '
        'tar archive or a folder of such, or a text file with PATH or PATH LABEL on each line',
    )
    if val:
        parser.add_argument(
            '--val-data',
            type=place,
            metavar='PATH',
            help='validation images, likewise (default: val in --data, or else every fifth image '
            'of each class; pretraining uses these too, probes and classifiers do not)',
        )


def use_data(
    cfg: Config,
    args: argparse.Namespace,
    labels: bool | None = None,
    splits: Sequence[str] = ('train', 'val'),
) -> None:
    """Bring ``--data`` into a config.

    Args:
        cfg (Config): Changed in place.
        args (argparse.Namespace): With what :func:`add_data` adds.
        labels (bool, optional): See :func:`~ser_mm.engine.images.use_images`. Defaults to None.
        splits (Sequence[str]): Keys of ``evaluation`` that will be used. Defaults to both.

    Raises:
        FileNotFoundError, PermissionError, ValueError: See
            :func:`~ser_mm.engine.images.use_images`.
    """
    val = getattr(args, 'val_data', None)
    if args.data is None and val is not None:
        raise ValueError('--val-data needs --data, the images to train on.')
    if args.data is not None:
        with about_option('--data'):
            use_images(cfg, args.data, val, labels, splits)


@contextmanager
def about_option(option: str) -> Iterator[None]:
    """Let the sentences of errors begin with the option that they are about."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise type(error)(f'{option} {error}') from error


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add what the launchers of distributed runs pass on."""
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='program that started the processes of a distributed run (default: none, one process)',
    )
    parser.add_argument(
        '--local-rank',
        '--local_rank',
        type=int,
        default=0,
        help='number of this process on its machine; some launchers set it',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that let MMEngine's Runner train or test."""
    parser.add_argument(
        '--work-dir',
        type=os.path.expanduser,
        help='folder of logs and results (default: work_dir of the config, or else work_dirs/ and '
        'the name of the config)',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints that hold more than data, and run the code in them',
    )
    add_cfg_options(parser, 'override fields of the config; lists as KEY="[a,b]"')
    add_launcher(parser)


def add_runs_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Add what the commands that train many runs have in common.

    Args:
        parser (argparse.ArgumentParser): Of the command.
        work_dir (str): Default of the folder of the runs.
    """
    parser.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        action=Once,
        default=[0, 1, 2],
        help='seeds that everything is trained from (default: 0 1 2)',
    )
    parser.add_argument(
        '--jobs', type=positive(int), default=1, help='runs at the same time (default: 1)'
    )
    parser.add_argument(
        '--gpus',
        type=positive(int),
        help='GPUs of each run, or CPU processes where there is no GPU (default: one process)',
    )
    parser.add_argument(
        '--work-dir',
        type=place,
        default=Path(work_dir),
        help='folder of the runs (default: %(default)s)',
    )
    add_cfg_options(parser, 'override fields of the config of all runs')


def add_experiment_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Add what the commands that train many runs, and probe them, have in common.

    Args:
        parser (argparse.ArgumentParser): Of the command.
        work_dir (str): Default of the folder of the runs.
    """
    add_runs_arguments(parser, work_dir)
    parser.add_argument(
        '--num-workers',
        type=workers,
        default=0,
        help='additional processes that read images to evaluate (default: 0)',
    )
    parser.add_argument(
        '--solver',
        choices=SOLVERS,
        help='how the linear probe is fitted: to convergence, or by a sweep of learning rates '
        f'(default: lbfgs up to {SOLVABLE} training images, else sgd)',
    )


def add_feature_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments that all evaluations of features take.

    Args:
        parser (argparse.ArgumentParser): Has those of the command already.
        out (str): Default folder of the results.
    """
    add_data(parser, 'to evaluate with')
    parser.add_argument(
        '--out', type=place, default=Path(out), help=f'folder of the results (default: {out})'
    )
    add_extraction_arguments(parser)


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how features are extracted, see :func:`feature_options`."""
    parser.add_argument(
        '--blocks',
        type=positive(int),
        default=1,
        help='number of last blocks whose [CLS] tokens, side by side, are the feature of an image: '
        '1 as in MoCo v3 (default), 4 as in DINO; a network without [CLS] gives the mean of its '
        'last map',
    )
    parser.add_argument(
        '--cache-dir',
        type=place,
        default=Path('work_dirs/features'),
        help='folder of features that were extracted before (default: %(default)s)',
    )
    add_reading(parser, 256, 'images per step and process')
    add_cfg_options(parser, 'override fields of the config, e.g. evaluation.val.indices=100')
    add_launcher(parser)


def add_reading(
    parser: argparse.ArgumentParser, batch_size: int = 64, what: str = 'images per step'
) -> None:
    """Add how images are read: how many at one time, and by how many processes."""
    parser.add_argument(
        '--batch-size',
        type=positive(int),
        default=batch_size,
        help=f'{what} (default: {batch_size})',
    )
    parser.add_argument(
        '--num-workers',
        type=workers,
        default=0,
        help='additional processes that read images (default: 0)',
    )


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the linear probe."""
    parser.add_argument(
        '--epochs',
        type=positive(int),
        default=50,
        help='epochs that the linear probe is trained for (default: 50)',
    )
    parser.add_argument(
        '--probe-batch',
        type=positive(int),
        default=256,
        help='features per step of the linear probe (default: 256)',
    )
    parser.add_argument(
        '--lrs',
        type=positive(float),
        nargs='+',
        default=LEARNING_RATES,
        help='learning rates that the linear probe tries, in units of --probe-batch / 256 '
        '(default: 9 from 0.001 to 10)',
    )


def feature_options(args: argparse.Namespace) -> dict:
    """What the command line says to :class:`~ser_mm.evaluation.features.CachedFeatures`."""
    names = ('cache_dir', 'blocks', 'batch_size', 'num_workers')
    return {name: getattr(args, name) for name in names}


def probe_options(args: argparse.Namespace) -> dict:
    """What the command line says to :func:`~ser_mm.evaluation.linear.fit_head`."""
    return dict(learning_rates=args.lrs, epochs=args.epochs, probe_batch=args.probe_batch)


def load_config(
    config: str,
    args: argparse.Namespace,
    splits: Sequence[str] = ('train', 'val'),
    labelled: bool = True,
    file: bool = False,
) -> Config:
    """Load and check the config of an evaluation, and join the other processes.

    Args:
        config (str): Path or name of the config.
        args (argparse.Namespace): With what :func:`add_feature_arguments` adds, or that without
            ``cache_dir``.
        splits (Sequence[str]): Keys of ``evaluation`` that will be used. None of them if the
            command brings its own images into the config.
        labelled (bool): Whether labels are needed. Defaults to True.
        file (bool): Whether ``--out`` is a file. Defaults to False: a folder.

    Returns:
        Config: With the options of the command line.

    Raises:
        FileNotFoundError: If the config or data is missing.
        ValueError: See :func:`~ser_mm.evaluation.data.check_evaluation`.
    """
    set_local_rank(args)
    MMLogger.get_current_instance().setLevel('WARNING')
    cfg = Config.fromfile(find_config(config))
    if splits:
        use_data(cfg, args, labelled, splits)
    set_options(cfg, args.cfg_options)
    check_writable('--out', args.out, file)
    if 'cache_dir' in args:
        check_writable('--cache-dir', args.cache_dir)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    if get_local_rank(args.launcher) == 0:
        check_evaluation(cfg, splits, labelled)
    processes = (cfg.get('env_cfg') or {}).get('mp_cfg') or {}
    set_multi_processing(**processes, distributed=args.launcher != 'none')
    if args.launcher != 'none' and not is_distributed():
        init_cpu_process_group(args.launcher, _PATIENCE) or init_dist(
            args.launcher, timeout=_PATIENCE
        )
    return cfg


def set_local_rank(args: argparse.Namespace) -> None:
    """Tell MMEngine the rank on this machine, which it reads from LOCAL_RANK, not from MPI's.

    Args:
        args (argparse.Namespace): With ``launcher`` and ``local_rank``.
    """
    local_rank = args.local_rank or get_local_rank(args.launcher)
    os.environ.setdefault('LOCAL_RANK', str(local_rank))


def check_writable(option: str, path: Path | str, file: bool = False) -> None:
    """Check that a folder or file can be written or made, before the work that it is for.

    Args:
        option (str): That named it.
        path (Path | str): The folder or file.
        file (bool): Whether it is a file. Defaults to False.

    Raises:
        OSError: If it cannot.
    """
    there = Path(path).absolute()
    if there.exists() and there.is_dir() == file:
        kind, other = ('a folder', 'a file') if file else ('a file', 'a folder')
        error = IsADirectoryError if file else NotADirectoryError
        raise error(f'{option} {path} is {kind}; name {other}.')
    while not os.path.lexists(there):
        there = there.parent
    if there != Path(path).absolute() and not there.is_dir():
        raise NotADirectoryError(f'{option} {path}: {there} is a file; name another place.')
    mode = os.W_OK | (os.X_OK if there.is_dir() else 0)
    if not os.access(there, mode, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(
            f'{option} {path}: {there} cannot be written to, permission denied; name another place.'
        )


@contextmanager
def one_sentence(
    errors: tuple[type[Exception], ...] = EXPECTED,
    interrupted: str = 'Interrupted.',
    trust: bool = False,
) -> Iterator[None]:
    """Run a command: no checkpoint runs code, and an error is one sentence and exit status 1.

    Serves as a decorator too.

    Args:
        errors (tuple[type[Exception], ...]): Errors that their message explains.
        interrupted (str): What to say when the user interrupts.
        trust (bool): See :func:`~ser_mm.checkpoint.guarded_checkpoints`. Defaults to False.

    Raises:
        SystemExit: In place of one of these errors.
    """
    try:
        with guarded_checkpoints(trust):
            yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except errors as error:
        if os.environ.get('SER_MM_TRACEBACK'):
            raise
        _exit(_explain(error))
    except KeyError as error:
        # A type in the config that MMEngine does not know; another key is an error of the code.
        unknown = re.match(r'(.* is not in the .* registry)\. ', str(error.args[0]))
        if os.environ.get('SER_MM_TRACEBACK') or not unknown:
            raise
        _exit(
            f'{unknown[1]}; correct the type in the config, or add the module that registers it '
            'to custom_imports.'
        )


def _exit(sentence: str) -> NoReturn:
    rank = f' on rank {get_rank()}' if is_distributed() else ''
    sys.exit(f'error{rank}: {sentence}')


def _explain(error: Exception) -> str:
    """The sentence of an error, where its own is a name of the system's."""
    if isinstance(error, DistNetworkError):
        port = os.environ.get('MASTER_PORT', '29500')
        if 'EADDRINUSE' in str(error):
            return (
                f'port {port} is in use, perhaps by another run; choose another: PORT=29501 '
                'before tools/*.sh, MASTER_PORT=29501 before other launchers.'
            )
    if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
        return (
            f'{error.filename}: {_DENIED[error.errno]}; change its permissions, or name '
            'another place.'
        )
    return str(error)
