"""Train a model from a config: on one CPU process, on several, or on GPUs."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

from ser_mm.checkpoint import CheckpointError
from ser_mm.cli._arguments import (
    CONFIG_HELP,
    EXPECTED,
    add_data,
    add_run_arguments,
    check_writable,
    make_parser,
    one_sentence,
    set_local_rank,
    use_data,
)
from ser_mm.cli._signals import command, end_with_parent, ending_on_signals
from ser_mm.datasets import split_batches
from ser_mm.engine.checkpointing import (
    check_same_on_all_ranks,
    resume_newest,
    written_checkpoints,
)
from ser_mm.engine.checks import DATALOADERS, check_batches, check_data, check_length
from ser_mm.engine.coco import check_coco
from ser_mm.engine.cpu import (
    adapt_to_device,
    close_process_group,
    get_global_rank,
    get_local_rank,
    init_cpu_process_group,
    limit_operator_caches,
)
from ser_mm.engine.hooks import check_device_views
from ser_mm.engine.images import check_class_labels
from ser_mm.engine.operators import read_config
from ser_mm.engine.options import set_options
from ser_mm.engine.pretrained import check_pretrained
from ser_mm.engine.resuming import ResumeError
from ser_mm.engine.schedules import follow_max_epochs
from ser_mm.models.two_view_wrapper import TwoViewWrapper


@dataclass
class _Run:
    """What is known of a run that a signal may stop."""

    args: argparse.Namespace
    cfg: Config | None = None
    earlier: Mapping[Path, int] = field(default_factory=dict)

    def last_words(self, stopped_by: str) -> str:
        """Where the last checkpoint is, and how to go on; for all ranks but one nothing."""
        if get_global_rank(self.args.launcher) != 0:
            return ''
        same = command(self.args.launcher) or 'the same command'
        cfg = self.cfg or Config()
        new = written_checkpoints(cfg) if self.cfg else {}
        last = next((file for file in new if self.earlier.get(file) != new[file]), None)
        if last:
            resuming = '' if self.args.resume == 'auto' else ' --resume'
            return f'Stopped by {stopped_by}. Last checkpoint: {last}. Go on by: {same}{resuming}'
        if cfg.get('resume'):
            place = f'Last checkpoint: still {cfg.load_from}'
            return f'Stopped by {stopped_by}. {place}. Go on by: {same}'
        return f'Stopped by {stopped_by} before the first checkpoint. Start again by: {same}'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('train', __doc__)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='resume from this checkpoint, or from the latest in the work dir if none is named',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--compile', action='store_true', help='compile the backbones with torch.compile'
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='leave out the validation between epochs'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.base_batch_size of the '
        'config',
    )
    parser.add_argument(
        '--no-pin-memory',
        action='store_true',
        help='do not copy batches to page-locked memory before they go to the GPU',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the processes that read images anew for every epoch',
    )
    add_data(parser, 'to train on')
    add_run_arguments(parser)
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Bring the command line into the config.

    Args:
        cfg (Config): Config of the run, changed in place.
        args (argparse.Namespace): What :func:`parse_args` returned.

    Raises:
        ValueError: If the config does not say for which batch its learning rate is.
    """
    use_data(cfg, args)
    if args.amp:  # before the options, which may be of it
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    set_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    check_writable('--work-dir', cfg.work_dir)

    if args.resume and args.resume != 'auto':
        if '://' not in args.resume and not Path(args.resume).is_file():
            raise FileNotFoundError(
                f'--resume {args.resume} is not a file; name a checkpoint, or leave the name out '
                f'to resume from the newest one in {cfg.work_dir}.'
            )
        cfg.resume, cfg.load_from = True, args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config.'
            )
        passes = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
        if passes > 1 and not cfg.auto_scale_lr.get('enable'):  # it is, in what a run has written
            # MMEngine counts the images of a pass, of which several make a step.
            cfg.auto_scale_lr.base_batch_size /= passes
        cfg.auto_scale_lr.enable = True
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None

    if _takes_views(cfg.model) and (cfg.model.get('algorithm') or {}).get('data_preprocessor'):
        # MMEngine would lay that of the config over that of the algorithm, an edited one too.
        cfg.model.setdefault('data_preprocessor', {})

    for name in DATALOADERS:
        loader = cfg.get(name)
        if not loader:
            continue
        if cfg.get('default_scope') == 'mmpretrain':
            # As in MMPretrain, whose own configs count on it; other scopes have other defaults.
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', True)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if args.no_pin_memory:
            loader.pin_memory = False
        if args.no_persistent_workers or not loader.get('num_workers'):
            loader.persistent_workers = False
    needed = ['EquivariantSplitHook', 'ResumeHook'] if _takes_views(cfg.model) else ['ResumeHook']
    if (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1) > 1:
        needed.append('MomentumUpdateHook')
    if _makes_views(cfg):  # from torch's generator, which is to differ by rank and epoch
        needed.append('EpochSeedHook')
    if _starts_workers_anew(cfg):  # MMEngine would give them the same seeds in every epoch
        cfg.train_dataloader.pop('disable_subprocess_warning', None)  # of MMEngine's function
        cfg.train_dataloader.worker_init_fn = dict(type='keep_worker_seed')
        needed.append('EpochSeedHook')
    needed += ['CompileHook'] * args.compile
    hooks = list(cfg.get('custom_hooks') or [])
    missing = [name for name in needed if name not in str(hooks)]
    cfg.custom_hooks = [*hooks, *(dict(type=f'mmpretrain.{name}') for name in missing)]


def _starts_workers_anew(cfg: Config) -> bool:
    """Whether processes start to read images in every epoch, and nothing says how to seed them."""
    if not (cfg.get('train_cfg') or {}).get('max_epochs'):
        return False
    loader = cfg.get('train_dataloader') or {}
    persistent = loader.get('persistent_workers')
    return bool(loader.get('num_workers')) and not persistent and 'worker_init_fn' not in loader


def _takes_views(model: dict) -> bool:
    """Whether the model takes the views of an EquivariantViewPipeline."""
    kind = model.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind)
    return isinstance(kind, type) and issubclass(kind, TwoViewWrapper)


def _makes_views(cfg: Config) -> bool:
    """Whether views are made by the preprocessor."""
    owners = [cfg, cfg.model, cfg.model.get('algorithm') or {}]
    return any((owner.get('data_preprocessor') or {}).get('views') for owner in owners)


def main(argv: Sequence[str] | None = None) -> None:
    """Train.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    args = parse_args(argv)
    if args.launcher == 'pytorch':  # torchrun, whose ranks would outlive it
        end_with_parent()
    run = _Run(args)
    with ending_on_signals(run.last_words):
        _train(args, run)
    close_process_group()  # when the Runner is out of scope


def _train(args: argparse.Namespace, run: _Run) -> None:
    set_local_rank(args)
    limit_operator_caches()  # before anything is computed
    # A field that no class takes is a TypeError.
    with one_sentence((*EXPECTED, TypeError), trust=args.trust_checkpoint):
        cfg = read_config(args.config)
        merge_args(cfg, args)
        check_length(cfg)
        follow_max_epochs(cfg)
        if args.resume == 'auto' or (cfg.get('resume') and not cfg.get('load_from')):
            resume_newest(cfg)
        run.earlier, run.cfg = written_checkpoints(cfg), cfg
        # One process per machine looks and speaks; the launcher then ends the others, which wait
        # for the process group.
        if get_local_rank(cfg.launcher) == 0:
            check_data(cfg)
            check_class_labels(cfg)
            check_pretrained(cfg)
            check_coco(cfg)
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
        init_cpu_process_group(cfg.launcher, timeout)
        adapt_to_device(cfg)
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        check_same_on_all_ranks(cfg)
        check_batches(runner.train_dataloader)
        # Builds the data set and the views, and what is wrong with them shows.
        check_device_views(runner.model, runner.train_dataloader)
        split_batches(runner.train_dataloader, runner.seed, get_rank(), get_world_size())
        if run.earlier and not cfg.get('resume') and get_rank() == 0:
            print_log(
                f'{cfg.work_dir} holds checkpoints of an earlier run, which this one writes over; '
                'to keep them, stop it, and name another --work-dir, or go on by --resume.',
                'current',
                logging.WARNING,
            )
    # What fails from here on is as likely an error of the code, which needs its traceback.
    foreseen = (FloatingPointError, UnpicklingError, CheckpointError, ResumeError)
    with one_sentence(foreseen, trust=args.trust_checkpoint):
        runner.train()


if __name__ == '__main__':
    main()
