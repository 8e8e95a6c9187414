"""Evaluate a checkpoint of a classifier or a detector on the test data of its config."""

import argparse
import os
import sys
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from ser_mm.engine.checks import check_coco
from ser_mm.engine.cpu import (
    adapt_to_device,
    check_data,
    close_process_group,
    get_local_rank,
    init_cpu_process_group,
)

# Fields of the visualization hook, the merge of flipped images, and the dump of predictions.
MMPRETRAIN = dict(
    draw='enable',
    show_dir='out_dir',
    tta_model=dict(type='AverageClsScoreTTA'),
    dump='DumpResults',
)
MMDET = dict(
    draw='draw',
    show_dir='test_out_dir',
    tta_model=dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    ),
    dump='DumpDetResults',
)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file; it has to fit the model completely')
    parser.add_argument(
        '--work-dir',
        help='folder of logs and metrics (default: work_dir of the config, '
        'or else work_dirs/ and the name of the config)',
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions')
    parser.add_argument('--show-dir', help='draw the predictions, into this folder')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_pipeline and tta_model of the config, or else flips',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override fields of the config; lists as KEY="[a,b]" or KEY=a,b',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help='set by launcher')
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error('--out must end with .pkl or .pickle.')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> dict:
    """Bring the command line into the config.

    Args:
        cfg (Config): Config of the run, changed in place.
        args (argparse.Namespace): What :func:`parse_args` returned.

    Returns:
        dict: What the config's scope calls things, one of the two above.
    """
    cfg.merge_from_dict(args.cfg_options or {})
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if not cfg.get('test_dataloader'):
        sys.exit(f'error: {args.config} has no test_dataloader; test.py is for evaluation configs.')
    if not cfg.test_dataloader.get('num_workers'):
        cfg.test_dataloader.persistent_workers = False

    names = MMDET if cfg.get('default_scope') == 'mmdet' else MMPRETRAIN
    if names is MMPRETRAIN:
        cfg.test_dataloader.setdefault('collate_fn', dict(type='default_collate'))
    if args.show_dir:
        hook = cfg.default_hooks.setdefault('visualization', dict(type='VisualizationHook'))
        hook.update({names['draw']: True, names['show_dir']: args.show_dir})
    if args.tta:
        dataset = cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        dataset.pipeline = cfg.get('tta_pipeline') or flip_pipeline(dataset.pipeline)
        cfg.model = ConfigDict(cfg.get('tta_model') or names['tta_model'], module=cfg.model)
    return names


def flip_pipeline(pipeline: list[dict]) -> list[dict]:
    """The pipeline of each image as it is and flipped."""
    *load, pack = deepcopy(pipeline)
    if 'meta_keys' in pack:
        pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    return [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def main() -> None:
    """Test."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    names = merge_args(cfg, args)

    # One process per machine looks and speaks; the launcher then ends the others.
    if get_local_rank(cfg.launcher) == 0:
        try:
            check_data(cfg, ['test_dataloader'])
            check_coco(cfg, ['test_dataloader'])
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f'error: {error}')
    init_cpu_process_group(cfg.launcher, cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout'))
    adapt_to_device(cfg)
    if args.tta:
        cfg.model_wrapper_cfg = None  # MMEngine takes the model that merges flips for a wrapper

    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    try:
        # MMEngine's `load_from` leaves what a checkpoint does not fill at its random start.
        runner.load_checkpoint(args.checkpoint, strict=True)
    except (FileNotFoundError, RuntimeError) as error:
        sys.exit(f'error: {args.checkpoint} does not fit {args.config}: {error}')
    if args.out:
        dump = METRICS.build(dict(type=names['dump'], out_file_path=args.out))
        runner.test_evaluator.metrics.append(dump)
    runner.test()


if __name__ == '__main__':
    main()
    close_process_group()
