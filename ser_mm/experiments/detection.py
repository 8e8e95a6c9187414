"""Detection on own images: what pretrained backbones are worth, by the share that is labelled."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import product
from os.path import abspath, join
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from ser_mm.checkpoint import StrictPretrained
from ser_mm.datasets.coco import check_annotations, read_coco
from ser_mm.engine.checks import check_data, check_length, walk_datasets
from ser_mm.engine.coco import check_coco, set_num_classes
from ser_mm.engine.operators import read_config
from ser_mm.engine.pretrained import start_from
from ser_mm.evaluation.metrics import mean_interval
from ser_mm.evaluation.results import make_table, write_results
from ser_mm.experiments.detectors import train_and_score, without_validation, write_random
from ser_mm.experiments.differences import DIFFERENCE, describe_difference
from ser_mm.experiments.runs import check_settings, finished
from ser_mm.files import write_text

MODES = ('frozen', 'unfrozen')
RANDOM = 'random'
"""Name of the backbone that is not pretrained."""
METRICS = dict(bbox_mAP='box mAP', bbox_mAP_50='AP50', bbox_mAP_75='AP75', segm_mAP='mask mAP')
"""Metrics of a run and their titles; the last one of detectors of masks."""
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
    metrics = _metrics(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        check_data(cfg, SCORED)
        check_coco(cfg, SCORED)
        pool, steps = _measure(cfg, gpus or 1)
    if min(shares) * len(pool) < 1 - 1e-4:  # of what the sentence rounds
        raise ValueError(
            f'shares: {min(shares):g} of the {len(pool)} images to train on is less than one '
            f'image; the smallest share is {1 / len(pool):.6g}.'
        )
    counts = {share: round(share * len(pool)) for share in shares}
    files = {name: _by_seed(checkpoint, seeds) for name, checkpoint in backbones.items()}
    starts: dict[str, tuple[ConfigDict, str | None]] = {
        file: _start(cfg, name, file, modes)
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
    inputs: dict[str, Any] = dict(train=_digest(train), val=_digest(val))
    if (gpus or 1) > 1:  # as it makes other batches
        inputs['processes'] = gpus
    runs = {}
    for seed, share, name in product(seeds, shares, files):
        backbone, digest = starts[files[name][seed]]
        for mode in by_name[name]:
            own = _run_config(cfg, backbone, mode, share, seed, work_dir, steps)
            own.inputs = dict(inputs, checkpoint=digest)
            own.work_dir = str(work_dir / 'runs' / name / mode / f'share{share}' / f'seed{seed}')
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
            classes=_dataset(cfg, 'train').metainfo.classes,
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


def own_detector(
    config: str | Path,
    train: Path,
    val: Path,
    images: Path,
    val_images: Path,
    cfg_options: Mapping[str, Any],
) -> Config:
    """Config of a detector on own annotations: their files, classes and their number.

    Args:
        config (str | Path): See :func:`compare_detectors`.
        train (Path): See :func:`compare_detectors`.
        val (Path): See :func:`compare_detectors`.
        images (Path): See :func:`compare_detectors`.
        val_images (Path): Folder of the validation images.
        cfg_options (Mapping[str, Any]): Fields to override in the end.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If MMDetection cannot run.
        ValueError: If the config is not of a detector that is trained by epochs, starts from other
            weights than the backbone's, or keeps no last checkpoint, or the files do not fit each
            other.
    """
    cfg = read_config(config)
    if cfg.get('default_scope') != 'mmdet' or 'backbone' not in (cfg.get('model') or {}):
        raise ValueError(
            f'{config} is not the config of a detector of MMDetection with model.backbone; take '
            'one such as coco/faster-rcnn_vits16.'
        )
    summaries = {}
    for split, file in dict(train=train, val=val).items():
        if not Path(file).exists():
            raise FileNotFoundError(
                f"{split}: {file} does not exist; name an annotation file in COCO's format."
            )
        summaries[split] = check_annotations(read_coco(file), file, annotated=False)
    classes, others = (tuple(x.categories.values()) for x in summaries.values())
    if classes != others:
        raise ValueError(
            f'train: {train} has the categories {list(classes)}, and val: {val} has '
            f'{list(others)}; write the same ones in the same order into both files.'
        )
    named = [
        {abspath(join(folder, image['file_name'])) for image in x.images.values()}
        for x, folder in zip(summaries.values(), (images, val_images), strict=True)
    ]
    if both := sorted(named[0] & named[1]):
        raise ValueError(
            f'val: {len(both)} of the images of {val} are in {train} too, such as {both[0]}; take '
            'them out of one of the files.'
        )

    set_num_classes(cfg.model, len(classes))
    for loader, file, folder in (('train', train, images), ('test', val, val_images)):
        _dataset(cfg, loader).update(
            data_root='',
            ann_file=abspath(file),
            data_prefix=dict(img=f'{abspath(folder)}/'),
            metainfo=dict(classes=classes),
        )
    for evaluator in _evaluators(cfg):
        evaluator.ann_file = abspath(val)
    for key in cfg_options:
        other = f'test_{key.removeprefix("val_")}'
        if key.startswith('val_') and other not in cfg_options:
            raise ValueError(
                f'{key} would change nothing, as detectors are scored on test_dataloader once '
                f'they are trained; set {other}.'
            )
    cfg.merge_from_dict(dict(cfg_options))
    check_length(cfg)
    if not cfg.train_cfg.get('max_epochs'):
        raise ValueError(
            f'{config} counts iterations, and shares of images are repeated in epochs; take a '
            'config with train_cfg.max_epochs.'
        )
    whole = cfg.model.get('init_cfg')
    starts = {
        'load_from': cfg.get('load_from'),
        'model.init_cfg': whole if 'Pretrained' in str(whole) else None,
    }
    for field, start in starts.items():
        if start:
            raise ValueError(
                f'{field} = {start!r} would take the place of the weights of all backbones; set '
                f'{field}=None.'
            )
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    interval = hook.get('interval', -1)
    is_last = interval > 0 and cfg.train_cfg.max_epochs % interval == 0
    if not hook.get('by_epoch', True) or not (is_last or hook.get('save_last', True)):
        raise ValueError(
            'default_hooks.checkpoint leaves out the checkpoint of the last epoch, which is '
            'scored; set its by_epoch and save_last to True.'
        )
    return without_validation(cfg)


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


def _dataset(cfg: Config, loader: str) -> ConfigDict:
    """The data set that reads the annotations of a loader, inside of what may be around it."""
    place = f'{loader}_dataloader'
    found = [x for _, x in walk_datasets(place, cfg.get(place) or {}) if 'ann_file' in x]
    if len(found) != 1:
        raise ValueError(
            f'{place} of the config has {len(found)} data sets with ann_file; take a config with '
            'one, in which the own annotations can take its place.'
        )
    return found[0]


def _measure(cfg: Config, ranks: int) -> tuple[list[Any], int]:
    """Ids of the images that are trained on, and the steps of all epochs of them."""
    from mmdet.registry import DATASETS

    cfg = deepcopy(cfg)
    loader, dataset = cfg.train_dataloader, _dataset(cfg, 'train')
    dataset.pipeline = []
    own = DATASETS.build(dataset)
    ids = [own.get_data_info(i)['img_id'] for i in range(len(own))]
    if not ids:
        raise ValueError(
            f'train: {dataset.ann_file} has no image that is trained on; filter_cfg of the data '
            f'set, {dataset.get("filter_cfg")}, leaves them all out.'
        )
    # What is around it may repeat images.
    images = len(own if loader.dataset is dataset else DATASETS.build(loader.dataset))
    batches = math.ceil(images / ranks) / loader.batch_size
    steps = math.floor(batches) if loader.get('drop_last') else math.ceil(batches)
    if not steps:
        raise ValueError(
            f'train_dataloader.batch_size = {loader.batch_size}, but there are {images} images to '
            'train on, which make no batch; lower it.'
        )
    return ids, steps * cfg.train_cfg.max_epochs


def _by_seed(checkpoint: str, seeds: Sequence[int]) -> dict[int, str]:
    return {seed: checkpoint.replace('{seed}', str(seed)) for seed in seeds}


def _digest(file: str | Path) -> str:
    """Changes when a file does that runs depend on."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _start(cfg: Config, name: str, checkpoint: str, modes: Sequence[str]) -> tuple[ConfigDict, str]:
    """Config of a backbone that starts from a checkpoint, tried, and the digest of that."""
    from mmdet.registry import MODELS

    file = Path(checkpoint).expanduser().absolute()
    if not file.is_file():
        raise FileNotFoundError(
            f'backbones: {name}={checkpoint} is not a file; name the checkpoint of a pretraining.'
        )
    model = deepcopy(cfg.model)
    start_from(model.backbone, file, (cfg.get('evaluation') or {}).get('prefix'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        try:
            network = MODELS.build(model).backbone
        except TypeError as error:  # a field that no class takes
            raise ValueError(f'model of the config cannot be built: {error}') from error
        if not isinstance(network, StrictPretrained):
            raise ValueError(
                f'model.backbone.type = {model.backbone.type!r} leaves what a checkpoint does not '
                'fill at random; take one of ser_mm, such as mmpretrain.SERVisionTransformer.'
            )
        try:
            network.init_weights()
        except ValueError as error:
            raise ValueError(f'backbones: {name}: {error}') from error
        parameters = network.parameters()  # type: ignore[attr-defined]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
    if 'frozen' in modes and trained:
        raise ValueError(
            f'modes: model.backbone.frozen_stages = {model.backbone.get("frozen_stages")} of the '
            f'config leaves {trained} of the weights to train; set it to the number of all blocks '
            'or stages with --cfg-options, or leave frozen out.'
        )
    return model.backbone, _digest(file)


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
        _dataset(own, 'train').ann_file = str(_share_file(work_dir, share, seed))
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
    content = read_coco(_dataset(cfg, 'train').ann_file)
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


def _evaluators(cfg: Config) -> list[ConfigDict]:
    given = cfg.get('test_evaluator') or []
    return list(given) if isinstance(given, list | tuple) else [given]


def _metrics(cfg: Config) -> list[str]:
    """The metrics that the config's evaluators give, as COCO defines them."""
    kinds: set[str] = set()
    for evaluator in _evaluators(cfg):
        kind, metric = evaluator.get('type'), evaluator.get('metric') or 'bbox'
        changed = map(evaluator.get, ('format_only', 'iou_thrs', 'metric_items', 'prefix'))
        if str(getattr(kind, '__name__', kind)).endswith('CocoMetric') and not any(changed):
            kinds.update([metric] if isinstance(metric, str) else metric)
    if 'bbox' not in kinds:
        raise ValueError(
            f'test_evaluator = {cfg.get("test_evaluator")} does not give the mAP of boxes as COCO '
            "defines it; set its type='CocoMetric' and metric='bbox', or a list with it, and leave "
            'format_only, iou_thrs, metric_items and prefix out.'
        )
    return [name for name in METRICS if name.partition('_')[0] in kinds]
