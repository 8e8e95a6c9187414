"""Detection on own images: what pretrained backbones are worth, by the share that is labelled."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from ser_mm.datasets.coco import read_coco
from ser_mm.engine.checks import check_data
from ser_mm.engine.coco import check_coco
from ser_mm.evaluation.metrics import mean_interval
from ser_mm.evaluation.results import make_table, write_results
from ser_mm.experiments.detectors import train_and_score, write_random
from ser_mm.experiments.differences import DIFFERENCE, describe_difference
from ser_mm.experiments.own_detector import (
    METRICS,
    count_steps,
    own_dataset,
    own_detector,
    own_metrics,
    start_backbone,
)
from ser_mm.experiments.runs import check_settings, finished, set_processes
from ser_mm.files import digest_file, write_text

MODES = ('frozen', 'unfrozen')
RANDOM = 'random'
"""Name of the backbone that is not pretrained."""
SCORED = ('train_dataloader', 'test_dataloader')


def compare_detectors(
    config: str | Path,
    train: Path,
    val: Path,
    images: Path,
    backbones: Mapping[str, str],
    work_dir: Path,
    val_images: Path | None = None,
    scratch: bool = False,
    modes: Sequence[str] = MODES,
    shares: Sequence[float] = (1.0,),
    seeds: Sequence[int] = (0, 1, 2),
    cfg_options: Mapping[str, Any] | None = None,
    jobs: int = 1,
    gpus: int | None = None,
) -> Path:
    """Train a detector on each backbone and share of the images, from each seed, and compare.

    All runs take as many steps as the config's epochs of all images; the images of a share are
    repeated. A seed draws the images of its shares, which are nested, and gives all backbones the
    same ones in the same order, and one start of the other layers. Scores are of the last
    checkpoint, on all validation images, by pycocotools.

    What was trained is not trained again, and an interrupted run goes on when it is called again.

    Args:
        config (str | Path): Config of the detector, see
            :func:`~ser_mm.engine.configs.find_config`. Its backbone is that of all checkpoints,
            with [CLS] inserted where it was in each; learning rate and epochs are those of all
            runs.
        train (Path): Annotations in COCO's format; the classes are its categories.
        val (Path): Those to score on, with the same categories.
        images (Path): Folder that the file names in both start from.
        backbones (Mapping[str, str]): Checkpoints by the name to show. '{seed}' in one stands for
            the seed. The others are compared with the first.
        work_dir (Path): Folder of runs, shares and results.
        val_images (Path, optional): Folder of the validation images. Defaults to None: ``images``.
        scratch (bool): Train from scratch too, from random weights that are not frozen; where
            ``modes`` has 'frozen', also on frozen random weights. Defaults to False.
        modes (Sequence[str]): Of :data:`MODES`: whether backbones are trained. Defaults to both.
        shares (Sequence[float]): Of the training images, each above 0 and up to 1. Defaults to
            all of them.
        seeds (Sequence[int]): Of the runs. Defaults to 0, 1 and 2.
        cfg_options (Mapping[str, Any], optional): Fields of the config to override. Defaults to
            None.
        jobs (int): Runs at the same time. Defaults to 1.
        gpus (int, optional): See :func:`~ser_mm.experiments.runs.training`. Defaults to None.

    Returns:
        Path: JSON file of the results, ``about`` and ``runs``; tables in Markdown are beside it.

    Raises:
        BlockingIOError: If another process trains one of the runs.
        FileNotFoundError: If a file is missing.
        ImportError: If MMDetection cannot run.
        pickle.UnpicklingError: If a checkpoint holds more than data.
        RunError: If a run fails.
        ValueError: If the arguments, annotations, checkpoints and the config do not fit each
            other, or a folder holds a run with other settings. Nothing is trained then.
    """
    work_dir = Path(work_dir).absolute()
    modes = list(dict.fromkeys(modes))
    shares = list(dict.fromkeys(map(float, shares)))
    seeds = list(dict.fromkeys(map(int, seeds)))
    _check_arguments(backbones, modes, shares, seeds)
    cfg = own_detector(config, train, val, images, val_images or images, cfg_options or {})
    metrics = own_metrics(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        check_data(cfg, SCORED)
        check_coco(cfg, SCORED)
        pool, steps = count_steps(cfg, gpus or 1)
    if min(shares) * len(pool) < 1 - 1e-4:  # of what the sentence rounds
        raise ValueError(
            f'shares: {min(shares):g} of the {len(pool)} images to train on is less than one '
            f'image; the smallest share is {1 / len(pool):.6g}.'
        )
    counts = {share: round(share * len(pool)) for share in shares}
    files = {name: _by_seed(checkpoint, seeds) for name, checkpoint in backbones.items()}
    starts: dict[str, tuple[ConfigDict, str | None]] = {
        file: (start_backbone(cfg, name, file, 'frozen' in modes), digest_file(file))
        for name in files
        for file in dict.fromkeys(files[name].values())
    }
    random = work_dir / 'weights' / f'{RANDOM}_seed{{seed}}.pth'
    by_name = {name: modes for name in backbones}
    if scratch:
        files[RANDOM] = _by_seed(str(random), seeds)
        for file in files[RANDOM].values():
            backbone = deepcopy(cfg.model.backbone)
            backbone.init_cfg = dict(type='Pretrained', checkpoint=file, prefix='backbone.')
            starts[file] = backbone, None
        by_name[RANDOM] = [mode for mode in MODES if mode == 'unfrozen' or mode in modes]
    inputs = dict(train=digest_file(train), val=digest_file(val))
    runs = {}
    for seed, share, name in product(seeds, shares, files):
        backbone, digest = starts[files[name][seed]]
        for mode in by_name[name]:
            own = _run_config(cfg, backbone, mode, share, seed, work_dir, steps)
            own.inputs = dict(inputs, checkpoint=digest)
            own.work_dir = str(work_dir / 'runs' / name / mode / f'share{share}' / f'seed{seed}')
            set_processes([own], gpus)
            check_settings(own)  # of all, before anything is written
            runs[name, mode, share, seed] = own

    for seed, file in files.get(RANDOM, {}).items():
        write_random(cfg.model.backbone, seed, Path(file))
    _write_shares(cfg, pool, counts, seeds, work_dir)
    todo = sum(not finished(own) for own in runs.values())
    print(f'{len(runs)} runs of {steps} steps, {todo} to train; logs are in {work_dir / "runs"}')
    scores = train_and_score(
        {', '.join(map(str, key)): own for key, own in runs.items()}, metrics, jobs, gpus
    )
    results: dict[str, Any] = dict(
        about=dict(
            config=str(config),
            cfg_options=dict(cfg_options or {}),
            train=str(train),
            val=str(val),
            classes=own_dataset(cfg, 'train').metainfo.classes,
            train_images=len(pool),
            val_images=len(read_coco(val)['images']),
            steps=steps,
            epochs=cfg.train_cfg.max_epochs,
            batch_size=cfg.train_dataloader.batch_size * (gpus or 1),
            backbones=dict(backbones),
        ),
        runs=[
            dict(backbone=name, mode=mode, share=share, images=counts[share], seed=seed, **score)
            for (name, mode, share, seed), score in zip(runs, scores.values(), strict=True)
        ],
    )
    write_results(work_dir, 'detection', results, report_detectors(results))
    return work_dir / 'detection.json'


def report_detectors(results: dict[str, Any]) -> str:
    """Table in Markdown: means over seeds with intervals, and differences to the first backbone.

    Args:
        results (dict): What :func:`compare_detectors` wrote.
    """
    about = results['about']
    groups: dict[tuple, dict[int, dict]] = {}
    for run in results['runs']:
        groups.setdefault((run['share'], run['mode'], run['backbone']), {})[run['seed']] = run
    first = next(iter(about['backbones']))
    names = [*about['backbones'], RANDOM]
    metrics = {name: title for name, title in METRICS.items() if name in results['runs'][0]}
    header = ['backbone', '', 'share', 'images', 'runs', 'box mAP', '95 % interval']
    header += [title for name, title in metrics.items() if name != 'bbox_mAP']
    header += [f'mAP - {first}', *DIFFERENCE]
    rows = []
    for (share, mode, name), by_seed in sorted(
        groups.items(), key=lambda x: (x[0][0], MODES.index(x[0][1]), names.index(x[0][2]))
    ):
        found = {key: [run[key] for run in by_seed.values()] for key in metrics}
        means = [f'{np.mean(values):.3f}' for values in found.values()]
        interval = '-'
        if len(by_seed) > 1:
            low, high = mean_interval(found['bbox_mAP'])['interval']
            interval = f'{low:.3f} to {high:.3f}'
        pairs = groups.get((share, mode, first), {})
        seeds = [seed for seed in by_seed if seed in pairs]
        difference = ['-'] * (1 + len(DIFFERENCE))
        if name != first and len(seeds) > 1:
            difference = describe_difference(
                *([group[seed]['bbox_mAP'] for seed in seeds] for group in (by_seed, pairs))
            )
        told = 'from scratch' if (name, mode) == (RANDOM, 'unfrozen') else mode
        images = next(iter(by_seed.values()))['images']
        rows.append([name, told, f'{100 * share:g} %', images, len(by_seed), means[0], interval])
        rows[-1] += [*means[1:], *difference]
    seeds = sorted({run['seed'] for run in results['runs']})
    fixed = [name for name, file in about['backbones'].items() if '{seed}' not in file]
    notes = [
        f'{about["config"]}, {len(about["classes"])} classes. Every run takes {about["steps"]} '
        f'steps of {about["batch_size"]} images, as {about["epochs"]} epochs of all '
        f'{about["train_images"]} training images do; the images of a share are repeated.',
        'mAP over IoU 0.5 to 0.95, AP50 and AP75, by pycocotools on all '
        f'{about["val_images"]} validation images: means over seeds {seeds}.',
        'A seed draws the images of its shares, the smaller in the larger, and gives all backbones '
        'the same ones in the same order and one start of the other layers. Differences are paired '
        "by seed; intervals and p are of Student's t, uncorrected for the number of comparisons.",
    ]
    if fixed:
        notes.append(
            f'One checkpoint for all seeds: {", ".join(fixed)}. The intervals say nothing of '
            'another pretraining.'
        )
    return f'{make_table(header, rows)}\n\n' + '\n'.join(f'- {note}' for note in notes)


def draw_shares(ids: Sequence[Any], counts: Sequence[int], seed: int) -> list[list[Any]]:
    """Draw images for shares, the fewer of which are among the more.

    Args:
        ids (Sequence): Ids of all images.
        counts (Sequence[int]): Images of each share.
        seed (int): Of the draw.

    Returns:
        list[list]: Ids of each share, in the order that they were drawn.
    """
    order = np.random.default_rng(seed).permutation(len(ids))
    return [[ids[i] for i in order[:count]] for count in counts]


def _check_arguments(
    backbones: Mapping[str, str],
    modes: Sequence[str],
    shares: Sequence[float],
    seeds: Sequence[int],
) -> None:
    for field, given in dict(backbones=backbones, modes=modes, shares=shares, seeds=seeds).items():
        if not given:
            raise ValueError(f'{field}: give one or more.')
    for name in backbones:
        if not re.fullmatch(r'\w[\w.+-]*', name) or name == RANDOM:
            raise ValueError(
                f'backbones: {name!r} names a folder and a row; take letters, digits, _, -, + and '
                f'., and not {RANDOM!r}, which scratch adds.'
            )
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f'modes: {mode!r} is not one of {" and ".join(MODES)}.')
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f'shares: {share!r} is not above 0 and up to 1; 0.1 is 10 %.')
    for seed in seeds:
        if seed < 0:
            raise ValueError(f'seeds: {seed} is negative; take 0 or more.')


def _by_seed(checkpoint: str, seeds: Sequence[int]) -> dict[int, str]:
    return {seed: checkpoint.replace('{seed}', str(seed)) for seed in seeds}


def _run_config(
    cfg: Config,
    backbone: ConfigDict,
    mode: str,
    share: float,
    seed: int,
    work_dir: Path,
    steps: int,
) -> Config:
    """Config of a run."""
    own = deepcopy(cfg)
    own.model.backbone = deepcopy(backbone)
    if mode == 'unfrozen' and 'frozen_stages' in backbone:  # networks of timm do not take it
        own.model.backbone.frozen_stages = -1
    own.randomness = dict(seed=seed)
    if share < 1:
        own_dataset(own, 'train').ann_file = str(_share_file(work_dir, share, seed))
        loader = own.train_dataloader
        # MMEngine ends the epoch after this many batches, wherever in the repetition.
        loader.num_batch_per_epoch = steps // own.train_cfg.max_epochs
        loader.dataset = dict(
            type='RepeatDataset', times=math.ceil(1 / share), dataset=loader.dataset
        )
    return own


def _share_file(work_dir: Path, share: float, seed: int) -> Path:
    return work_dir / 'shares' / f'share{share}_seed{seed}.json'


def _write_shares(
    cfg: Config,
    ids: Sequence[Any],
    counts: Mapping[float, int],
    seeds: Sequence[int],
    work_dir: Path,
) -> None:
    """Write the annotations of the images that each seed draws for each share."""
    some = [share for share in counts if share < 1]
    if not some:
        return
    content = read_coco(own_dataset(cfg, 'train').ann_file)
    images = {image['id']: image for image in content['images']}
    for seed in seeds:
        drawn = draw_shares(ids, [counts[share] for share in some], seed)
        for share, chosen in zip(some, drawn, strict=True):
            kept = set(chosen)
            own = dict(
                content,
                images=[images[id] for id in chosen],
                annotations=[x for x in content['annotations'] if x['image_id'] in kept],
            )
            write_text(_share_file(work_dir, share, seed), json.dumps(own))
