"""The detection demo: a detector on each of the frozen backbones of the demo."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope

from ser_mm.datasets import write_bundled_digits
from ser_mm.engine.cpu import count_cores
from ser_mm.engine.operators import require_operators
from ser_mm.evaluation.results import describe_seeds, format_mean, make_table
from ser_mm.experiments.demo import ARMS, CONFIGS
from ser_mm.experiments.detectors import frozen_backbone, train_and_score, without_validation
from ser_mm.experiments.runs import check_settings, finished, reserved
from ser_mm.files import digest_file, write_text
from ser_mm.visualization import draw_detections

METRICS = dict(bbox_mAP='box mAP', bbox_mAP_50='box AP50', segm_mAP='mask mAP')
SHOWN = 4
"""Validation images that are drawn."""


def pretrained_backbone(pretrained: Path, algorithm: str, arm: str, seed: int) -> dict:
    """Config of the backbone of a finished pretraining of the demo, with its checkpoint.

    Args:
        pretrained (Path): Folder of the demo.
        algorithm (str): Its algorithm.
        arm (str): Of :data:`~ser_mm.experiments.demo.ARMS`.
        seed (int): Its seed.

    Raises:
        FileNotFoundError: If there is none.
    """
    work_dir = pretrained / algorithm / f'seed{seed}' / arm.replace(' ', '_')
    config = work_dir.with_suffix('.py')
    cfg = Config.fromfile(config) if config.exists() else None
    if cfg:
        cfg.work_dir = str(work_dir)  # wherever it was when it was trained
    if not (cfg and finished(cfg)):
        raise FileNotFoundError(
            f'{work_dir} holds no finished pretraining. Make it with: make demo '
            f'ALGORITHM={algorithm} DEMO_ARGS="--seeds {seed} --work-dir {pretrained}"'
        )
    backbone = (cfg.model.get('algorithm') or cfg.model).backbone
    init_cfg = dict(type='Pretrained', checkpoint=finished(cfg), prefix='backbone.')
    return dict(backbone, init_cfg=init_cfg)


def detector_config(
    backbone: dict, data: Path, work_dir: Path, seed: int, cfg_options: Mapping[str, Any]
) -> Config:
    """Config of the detector on a backbone.

    Args:
        backbone (dict): Config of a ViT whose ``arch`` is a dict.
        data (Path): Folder that :func:`~ser_mm.datasets.write_bundled_digits` wrote.
        work_dir (Path): Folder of the run.
        seed (int): Its seed.
        cfg_options (Mapping[str, Any]): Fields to override.
    """
    cfg = Config.fromfile(CONFIGS / 'detection.py')
    cfg.model.backbone = frozen_backbone(backbone)
    cfg.model.neck.in_channels = backbone['arch']['embed_dims']
    for split in ('train', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = f'{data}/'
    cfg.test_evaluator.ann_file = f'{data}/val.json'
    cfg.randomness = dict(seed=seed)
    if start := backbone.get('init_cfg'):
        cfg.inputs = dict(checkpoint=digest_file(start['checkpoint']))
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(dict(cfg_options))
    return without_validation(cfg)


def draw(file: Path, arms: Mapping[str, Config]) -> None:
    """Draw the first validation images: the truth, and as many of each detector's best guesses.

    Args:
        file (Path): Image file to write.
        arms (Mapping[str, Config]): Configs of finished runs, by the name to show.
    """
    from mmdet.apis import inference_detector, init_detector
    from mmdet.datasets import CocoDataset

    cfg = next(iter(arms.values()))
    data = cfg.test_dataloader.dataset
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


def summarize(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Markdown table of the metrics: mean and, over several seeds, standard deviation.

    Args:
        results (Mapping): By the name of a backbone, for each seed, what MMDetection names
            'coco/bbox_mAP' and so on.
    """
    rows = [
        [arm, *(format_mean([run[f'coco/{name}'] for run in runs]) for name in METRICS)]
        for arm, runs in results.items()
    ]
    return make_table(['backbone', *METRICS.values()], rows)


def run_detection(
    algorithm: str,
    seeds: Sequence[int],
    pretrained: Path,
    work_dir: Path,
    cfg_options: Mapping[str, Any],
) -> Path:
    """Write the data, train the detectors, print the table, and draw.

    Args:
        algorithm (str): Algorithm of the demo.
        seeds (Sequence[int]): Seeds of the demo, and of the detectors.
        pretrained (Path): Folder of the demo.
        work_dir (Path): Folder of the detectors, where each algorithm has its own.
        cfg_options (Mapping[str, Any]): Fields of the detectors' config to override.

    Returns:
        Path: Folder of the results, ``table.md``, ``results.json`` and ``detections.png``.

    Raises:
        BlockingIOError: If another process trains one of the detectors.
        FileNotFoundError: If a run of the demo is missing.
        ImportError: If MMDetection cannot run: see :func:`require_operators`.
        RunError: If a run fails.
        ValueError: If a folder holds a run with other settings.
    """
    require_operators('The detection demo')
    start = time.monotonic()
    backbones = {
        seed: {arm: pretrained_backbone(pretrained, algorithm, arm, seed) for arm in ARMS}
        for seed in seeds
    }
    init_default_scope('mmdet')
    data, out = work_dir / 'data', work_dir / algorithm
    write_bundled_digits(data)
    results = {name: [] for name in ('random', *ARMS)}
    configs = {
        seed: {
            arm: detector_config(
                backbone, data, out / f'seed{seed}' / arm.replace(' ', '_'), seed, cfg_options
            )
            for arm, backbone in {
                'random': dict(found['baseline'], init_cfg=None),
                **found,
            }.items()
        }
        for seed, found in backbones.items()
    }
    runs = [cfg for arms in configs.values() for cfg in arms.values()]
    for cfg in runs:
        check_settings(cfg)  # of all, before the first is trained
    with reserved(runs):
        for seed, arms in configs.items():
            print(f'seed {seed}: detectors on {", ".join(arms)}; logs are in {out}/seed{seed}')
            for arm, found in train_and_score(arms, list(METRICS)).items():
                results[arm].append({f'coco/{name}': value for name, value in found.items()})
            if seed == seeds[0] and all(map(finished, arms.values())):  # not removed meanwhile
                draw(out / 'detections.png', arms)

    train_images, val_images = (
        len(json.loads((data / f'{split}.json').read_text())['images'])
        for split in ('train', 'val')
    )
    notes = [
        f'Mask R-CNN on a frozen backbone, {train_images} training and {val_images} validation '
        f'images, 10 classes, {arms["SER"].train_cfg.max_epochs} epochs, {describe_seeds(seeds)}',
        'mAP over IoU 0.5 to 0.95, by pycocotools.',
        '"views only" is pretraining with SER\'s views and its gradient cut.',
    ]
    table = f'{summarize(results)}\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n'
    write_text(out / 'table.md', table)
    write_text(out / 'results.json', json.dumps(dict(seeds=list(seeds), results=results), indent=1))
    print(
        f'\n{table}\nTable, results and detections.png are in {out} '
        f'({time.monotonic() - start:.0f} s on {count_cores()} cores).'
    )
    return out
