"""Evaluate a checkpoint of a classifier or a detector on the test data of its config."""

import argparse
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS, RUNNERS
from mmengine.runner import Runner

from ser_mm.checkpoint import differences
from ser_mm.cli._arguments import (
    CONFIG_HELP,
    add_run_arguments,
    check_writable,
    make_parser,
    one_sentence,
    set_local_rank,
)
from ser_mm.engine.checks import check_data
from ser_mm.engine.coco import check_coco, predicts_masks
from ser_mm.engine.cpu import (
    adapt_to_device,
    close_process_group,
    get_local_rank,
    init_cpu_process_group,
)
from ser_mm.engine.operators import read_config
from ser_mm.engine.options import set_options

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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser('test', __doc__)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help='checkpoint file; it has to fit the model completely')
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='file that the predictions are written to'
    )
    parser.add_argument('--show-dir', help='folder that images with the predictions are drawn to')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_pipeline and tta_model of the config, or else flips',
    )
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out} must end with .pkl or .pickle.')
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> dict:
    """Bring the command line into the config.

    Args:
        cfg (Config): Config of the run, changed in place.
        args (argparse.Namespace): What :func:`parse_args` returned.

    Returns:
        dict: What the config's scope calls things, one of the two above.

    Raises:
        ValueError: If the config has no data to test on, or ``--tta`` cannot merge what it finds.
    """
    set_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    check_writable('--work-dir', cfg.work_dir)
    if args.out:
        check_writable('--out', args.out, file=True)
    if not (cfg.get('test_dataloader') and cfg.get('test_evaluator')):
        raise ValueError(
            f'{args.config} has no test_dataloader; name the config of a classifier or a detector, '
            'or evaluate a self-supervised network with the command probe.'
        )
    if not cfg.test_dataloader.get('num_workers'):
        cfg.test_dataloader.persistent_workers = False

    names: dict[str, Any] = MMDET if cfg.get('default_scope') == 'mmdet' else MMPRETRAIN
    if names is MMPRETRAIN:
        cfg.test_dataloader.setdefault('collate_fn', dict(type='default_collate'))
    if args.show_dir:
        hook = cfg.default_hooks.setdefault('visualization', dict(type='VisualizationHook'))
        hook.update({names['draw']: True, names['show_dir']: args.show_dir})
        if hook.type == 'DetVisualizationHook':
            import_module('ser_mm.engine.detection_hook')  # needs MMDetection
            hook.type = 'mmpretrain.DrawDetectionsHook'
    if args.tta:
        dataset = cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        dataset.pipeline = cfg.get('tta_pipeline') or flip_pipeline(dataset.pipeline)
        merge = cfg.get('tta_model') or names['tta_model']
        if str(merge['type']).endswith('DetTTAModel') and predicts_masks(cfg):
            raise ValueError(
                f"--tta: MMDetection's {merge['type']} merges boxes, and {args.config} finds masks "
                'too; leave --tta out, or name a tta_model in the config that merges masks.'
            )
        cfg.model = ConfigDict(merge, module=cfg.model)
    return names


def flip_pipeline(pipeline: list[ConfigDict]) -> list[dict]:
    """The pipeline of each image as it is and flipped."""
    *load, pack = deepcopy(pipeline)
    if 'meta_keys' in pack:
        pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    return [*load, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def main(argv: Sequence[str] | None = None) -> None:
    """Test.

    Args:
        argv (Sequence[str], optional): Command line. Defaults to None: that of the process.
    """
    _test(parse_args(argv))
    close_process_group()  # when the Runner is out of scope


def _test(args: argparse.Namespace) -> None:
    set_local_rank(args)
    with one_sentence(trust=args.trust_checkpoint):
        cfg = read_config(args.config)
        names = merge_args(cfg, args)
        # One process per machine looks and speaks; the launcher then ends the others.
        if get_local_rank(cfg.launcher) == 0:
            check_data(cfg, ['test_dataloader'])
            check_coco(cfg, ['test_dataloader'])
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
        init_cpu_process_group(cfg.launcher, timeout)
        adapt_to_device(cfg)
        if args.tta:
            cfg.model_wrapper_cfg = None  # MMEngine takes the model that merges flips for a wrapper
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        try:
            # MMEngine's `load_from` leaves what a checkpoint does not fill at its random start.
            runner.load_checkpoint(args.checkpoint, strict=True)
        except RuntimeError as error:
            raise ValueError(
                f'{args.checkpoint} does not fit {args.config}. {differences(str(error))}'
            ) from error
    if args.out:
        dump = METRICS.build(dict(type=names['dump'], out_file_path=args.out))
        runner.test_evaluator.metrics.append(dump)
    # What fails from here on is as likely an error of the code, which needs its traceback.
    with one_sentence((), trust=args.trust_checkpoint):
        runner.test()


if __name__ == '__main__':
    main()
