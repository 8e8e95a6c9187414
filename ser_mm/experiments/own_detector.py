"""The config of a detector on own annotations, and what it says of training and scores."""

import math
from collections.abc import Mapping
from copy import deepcopy
from os.path import abspath, join
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from ser_mm.checkpoint import StrictPretrained
from ser_mm.datasets.coco import check_annotations, read_coco
from ser_mm.engine.checks import check_length, walk_datasets
from ser_mm.engine.coco import set_num_classes
from ser_mm.engine.operators import read_config
from ser_mm.engine.pretrained import start_from
from ser_mm.experiments.detectors import without_validation

METRICS = dict(bbox_mAP='box mAP', bbox_mAP_50='AP50', bbox_mAP_75='AP75', segm_mAP='mask mAP')
"""Metrics of a run and their titles; the last one of detectors of masks."""


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
        config (str | Path): See :func:`~ser_mm.engine.configs.find_config`.
        train (Path): Annotations in COCO's format; the classes are its categories.
        val (Path): Those to score on, with the same categories.
        images (Path): Folder that the file names of ``train`` start from.
        val_images (Path): That of ``val``.
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
    classes = _check_files(train, val, images, val_images)
    set_num_classes(cfg.model, len(classes))
    for loader, file, folder in (('train', train, images), ('test', val, val_images)):
        own_dataset(cfg, loader).update(
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
    _check_training(cfg, config)
    return without_validation(cfg)


def own_dataset(cfg: Config, loader: str) -> ConfigDict:
    """The data set that reads the annotations of a loader, inside of what may be around it.

    Args:
        cfg (Config): Of a detector.
        loader (str): 'train' or 'test'.

    Raises:
        ValueError: If there is none, or several.
    """
    place = f'{loader}_dataloader'
    found = [x for _, x in walk_datasets(place, cfg.get(place) or {}) if 'ann_file' in x]
    if len(found) != 1:
        raise ValueError(
            f'{place} of the config has {len(found)} data sets with ann_file; take a config with '
            'one, in which the own annotations can take its place.'
        )
    return found[0]


def count_steps(cfg: Config, processes: int) -> tuple[list[Any], int]:
    """Ids of the images that are trained on, and the steps of all epochs of them.

    Args:
        cfg (Config): What :func:`own_detector` returned.
        processes (int): Of a run.

    Raises:
        ValueError: If no image is trained on, or too few are for a batch.
    """
    from mmdet.registry import DATASETS

    cfg = deepcopy(cfg)
    loader, dataset = cfg.train_dataloader, own_dataset(cfg, 'train')
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
    batches = math.ceil(images / processes) / loader.batch_size
    steps = math.floor(batches) if loader.get('drop_last') else math.ceil(batches)
    if not steps:
        raise ValueError(
            f'train_dataloader.batch_size = {loader.batch_size}, but there are {images} images to '
            'train on, which make no batch; lower it.'
        )
    return ids, steps * cfg.train_cfg.max_epochs


def start_backbone(cfg: Config, name: str, checkpoint: str, frozen: bool) -> ConfigDict:
    """Config of the backbone of a detector, started from a checkpoint, which is tried.

    Args:
        cfg (Config): What :func:`own_detector` returned.
        name (str): Of the backbone, for errors.
        checkpoint (str): File.
        frozen (bool): Whether it is to be frozen as the config has it.

    Raises:
        FileNotFoundError: If the checkpoint is missing.
        pickle.UnpicklingError: If it holds more than data.
        ValueError: If it does not fill the backbone, or ``frozen`` leaves weights to train.
    """
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
    if frozen and trained:
        raise ValueError(
            f'modes: model.backbone.frozen_stages = {model.backbone.get("frozen_stages")} of the '
            f'config leaves {trained} of the weights to train; set it to the number of all blocks '
            'or stages with --cfg-options, or leave frozen out.'
        )
    return model.backbone


def own_metrics(cfg: Config) -> list[str]:
    """The metrics that the evaluators of a detector give, as COCO defines them.

    Args:
        cfg (Config): What :func:`own_detector` returned.

    Returns:
        list[str]: Of :data:`METRICS`.

    Raises:
        ValueError: If they do not give the mAP of boxes.
    """
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


def _check_files(train: Path, val: Path, images: Path, val_images: Path) -> tuple[str, ...]:
    """The classes of both annotation files, which have no image in common."""
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
    return classes


def _check_training(cfg: Config, config: str | Path) -> None:
    """Check that a run starts from its backbone alone, and keeps the checkpoint that is scored."""
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


def _evaluators(cfg: Config) -> list[ConfigDict]:
    given = cfg.get('test_evaluator') or []
    return list(given) if isinstance(given, list | tuple) else [given]
