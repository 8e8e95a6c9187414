"""Train a detector on the frozen backbones of the demo, at toy scale, and compare.

The data are handwritten digits on photographs, as a COCO data set with boxes and masks; training
and validation share neither a digit nor a photograph. From each seed, the same Mask R-CNN is
trained on each backbone: a random one and those of the pretraining demo, which has to be run
before (make demo). Trained detectors are not trained again, interrupted ones go on: run the same
command again.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from demo import ARMS, CONFIGS
from mmdet.apis import inference_detector, init_detector
from mmdet.datasets import CocoDataset
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ser_mm.cli._arguments import make_table
from ser_mm.datasets import write_bundled_digits
from ser_mm.experiments.runs import finished, train
from ser_mm.visualization import draw_detections

METRICS = {'coco/bbox_mAP': 'box mAP', 'coco/bbox_mAP_50': 'box AP50', 'coco/segm_mAP': 'mask mAP'}
SHOWN = 4


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    names = sorted(file.stem.removeprefix('ser_') for file in CONFIGS.glob('ser_*.py'))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--algorithm', choices=names, default='mocov3')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument(
        '--pretrained', type=Path, default=Path('work_dirs/demo'), help='--work-dir of the demo'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo_detection'))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='override fields of the config of all detectors',
    )
    return parser.parse_args()


def pretrained_backbone(args: argparse.Namespace, arm: str, seed: int) -> dict:
    """Config of the backbone of a finished pretraining, with its checkpoint.

    Raises:
        SystemExit: If there is none.
    """
    work_dir = args.pretrained / args.algorithm / f'seed{seed}' / arm.replace(' ', '_')
    config = work_dir.with_suffix('.py')
    cfg = Config.fromfile(config) if config.exists() else None
    if cfg:
        cfg.work_dir = str(work_dir)  # wherever it was when it was trained
    if not (cfg and finished(cfg)):
        sys.exit(
            f'error: {work_dir} holds no finished pretraining. Make it with: make demo '
            f'ALGORITHM={args.algorithm} DEMO_ARGS="--seeds {seed} --work-dir {args.pretrained}"'
        )
    backbone = (cfg.model.get('algorithm') or cfg.model).backbone
    init_cfg = dict(type='Pretrained', checkpoint=finished(cfg), prefix='backbone.')
    return dict(backbone, init_cfg=init_cfg)


def arm_config(args: argparse.Namespace, arm: str, backbone: dict, seed: int) -> Config:
    """Config of the detector on a backbone."""
    cfg = Config.fromfile(CONFIGS / 'detection.py')
    cfg.model.backbone = dict(
        backbone,
        type=f'mmpretrain.{backbone["type"]}',
        out_type='featmap',
        frozen_stages=backbone['arch']['num_layers'],
    )
    cfg.model.neck.in_channels = backbone['arch']['embed_dims']
    root = f'{args.work_dir}/data/'
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = root
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = f'{root}val.json'
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(args.work_dir / args.algorithm / f'seed{seed}' / arm.replace(' ', '_'))
    cfg.merge_from_dict(args.cfg_options)
    return cfg


def read_metrics(cfg: Config) -> dict[str, float]:
    """The metrics of the last validation of a run."""
    files = sorted(Path(cfg.work_dir).glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    # MMDetection reports no metric when a detector finds nothing.
    found = [record for record in records if 'coco/bbox_mAP' in record] or [{}]
    return {key: found[-1].get(key, 0.0) for key in METRICS}


def draw(file: Path, arms: dict[str, Config]) -> None:
    """Draw the first validation images: the truth, and as many of each detector's best guesses."""
    cfg = next(iter(arms.values()))
    data = cfg.val_dataloader.dataset
    truth = CocoDataset(
        data_root=data.data_root,
        ann_file=data.ann_file,
        data_prefix=dict(img=data.data_prefix.img),
        metainfo=data.metainfo,
        indices=SHOWN,
        pipeline=cfg.train_pipeline,
    )
    images, found = [], {'truth': []}
    for item in truth:
        sample = item['data_samples'].gt_instances
        images.append(item['inputs'].permute(1, 2, 0).numpy())
        found['truth'].append((sample.bboxes.tensor, sample.labels.tolist(), sample.masks.masks))
    for arm, cfg in arms.items():
        detector = init_detector(cfg, finished(cfg), device=get_device())
        found[arm] = []
        for image, (objects, *_) in zip(images, found['truth'], strict=True):
            instances = inference_detector(detector, image[..., ::-1].copy()).pred_instances.cpu()
            instances = instances[instances.scores.argsort(descending=True)[: len(objects)]]
            masks = instances.masks.numpy().astype(np.uint8)
            found[arm].append((instances.bboxes, instances.labels.tolist(), masks))
    draw_detections(images, found, data.metainfo.classes, file)


def summarize(results: dict[str, list[dict]]) -> str:
    """Markdown table of the metrics: mean and, over several seeds, standard deviation."""
    rows = []
    for arm, runs in results.items():
        cells = []
        for key in METRICS:
            values = [run[key] for run in runs]
            deviation = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
            cells.append(f'{statistics.mean(values):.3f}{deviation}')
        rows.append([arm, *cells])
    return make_table(['backbone', *METRICS.values()], rows)


def main() -> None:
    """Write the data, train, print the table, draw."""
    args = parse_args()
    start = time.monotonic()
    MMLogger.get_instance('demo', log_level='WARNING')
    backbones = {
        seed: {arm: pretrained_backbone(args, arm, seed) for arm in ARMS} for seed in args.seeds
    }
    init_default_scope('mmdet')
    write_bundled_digits(args.work_dir / 'data')
    out = args.work_dir / args.algorithm
    results = {name: [] for name in ('random', *ARMS)}
    for seed, found in backbones.items():
        found = {'random': dict(found['baseline'], init_cfg=None), **found}
        arms = {arm: arm_config(args, arm, backbone, seed) for arm, backbone in found.items()}
        print(f'seed {seed}: detectors on {", ".join(arms)}; logs are in {out}/seed{seed}')
        train(arms)
        for arm, cfg in arms.items():
            results[arm].append(read_metrics(cfg))
        if seed == args.seeds[0]:
            draw(out / 'detections.png', arms)

    data = args.work_dir / 'data'
    train_images, val_images = (
        len(json.loads((data / f'{split}.json').read_text())['images'])
        for split in ('train', 'val')
    )
    notes = [
        f'Mask R-CNN on a frozen backbone, {train_images} training and {val_images} validation '
        f'images, 10 classes, {arms["SER"].train_cfg.max_epochs} epochs, seeds {args.seeds}'
        + (': mean ± standard deviation.' if len(args.seeds) > 1 else '.'),
        'mAP over IoU 0.5 to 0.95, by pycocotools.',
        '"views only" is pretraining with SER\'s views and its gradient cut.',
    ]
    table = f'{summarize(results)}\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n'
    (out / 'table.md').write_text(table)
    (out / 'results.json').write_text(json.dumps(dict(seeds=args.seeds, results=results), indent=1))
    print(
        f'\n{table}\nTable, results and detections.png are in {out} '
        f'({time.monotonic() - start:.0f} s on {len(os.sched_getaffinity(0))} cores).'
    )


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted; the same command goes on from the last epoch.')
