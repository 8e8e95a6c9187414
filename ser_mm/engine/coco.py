"""Checks of a config of MMDetection before long work starts."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from os.path import abspath, exists, isfile, join
from typing import Any
from urllib.parse import unquote

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.logging import print_log
from PIL import Image

from ser_mm.datasets.coco import CocoSummary, check_annotations, read_coco
from ser_mm.datasets.transforms.check_image_size import describe_size_mismatch

from .checks import DATALOADERS, walk_datasets

_LOOKED_AT = 1000  # images of a data set whose size is read before training
_EXIF_ORIENTATION = 274
_TURNED = (5, 6, 7, 8)  # values of it that exchange height and width


def check_coco(cfg: Config, dataloaders: Sequence[str] = DATALOADERS[:2]) -> None:
    """Fail early, in one sentence, when annotations, classes, images and heads do not fit.

    MMDetection itself skips the annotations of classes that a file does not know, takes the
    labels in the order of the file, whatever the order of the names, and goes on where boxes do
    not fit the images. Annotation files are read completely; of the images, all have to be there,
    and up to 1000 of each data set have to have the size of their annotations. The other ones are
    compared when they are read: see :class:`~ser_mm.datasets.CheckImageSize`.

    Args:
        cfg (Config): Config of the run; one of another scope than 'mmdet' is not checked.
        dataloaders (Sequence[str]): Names of the data loaders to look at. Defaults to those
            that training uses.

    Raises:
        FileNotFoundError: If an image is missing, or an annotation file that an evaluator names.
        ValueError: See :func:`~ser_mm.datasets.coco.check_annotations`; if a data set's classes are
            not those of its file, in the file's order, or their number is not the
            ``num_classes`` of a head; or if nothing is annotated.
    """
    if cfg.get('default_scope') != 'mmdet':
        return
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    for loader in dataloaders:
        files: dict[tuple, CocoSummary] = {}  # of this loader only, as they are large
        found = []
        for field, dataset in walk_datasets(loader, cfg.get(loader) or {}):
            kind = dataset.get('type')
            kind = DATASETS.get(kind) if isinstance(kind, str) else kind
            if kind and issubclass(kind, CocoDataset):
                found.append((field, dataset, kind, _classes(field, dataset, kind)))
        evaluators = list(_coco_evaluators(loader.replace('dataloader', 'evaluator'), cfg))
        predicts = loader == 'test_dataloader' and all(e.get('format_only') for _, e in evaluators)
        objects = 0
        for field, dataset, kind, classes in found:
            path = join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            if not exists(path):  # in a remote store; check_data tells of one that is missing
                objects = 1
                continue
            if kind.load_data_list is not CocoDataset.load_data_list:
                names = [category['name'] for category in read_coco(path).get('categories', ())]
                _check_classes(field, classes, path, names)
                objects = 1
                continue
            summary = _summarize(
                files,
                path,
                masks=not predicts and _loads_masks(dataset.get('pipeline')),
                evaluation=any(_same(path, e.get('ann_file')) for _, e in evaluators),
                annotated=not predicts,
            )
            _check_classes(field, classes, path, list(summary.categories.values()))
            objects += _count(summary, classes)
            _check_images(field, dataset, path, summary)
            for name, evaluator in evaluators:
                _check_evaluator(name, evaluator, field, classes, path, summary, files)
        for field, _, _, classes in found:
            _check_heads(field, len(classes), cfg.model)
        if found and not objects and not predicts:
            field, dataset, _, classes = found[0]
            path = join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            raise ValueError(
                f'{field}.ann_file: {path} has no annotation of {_shorten(classes)} that counts: '
                "none is large enough, inside of its image and without 'iscrowd'. Name another "
                'file or other classes, or correct the annotations.'
            )


def set_num_classes(model: dict, count: int) -> None:
    """Set the number of classes of all heads of a detector.

    Args:
        model (dict): Its config, changed in place.
        count (int): Number of classes.

    Raises:
        ValueError: If no head has a number of classes.
    """
    heads = list(_heads(model, 'model'))
    if not heads:
        raise ValueError('model has no head with num_classes; take the config of a detector.')
    for _, head in heads:
        head['num_classes'] = count


def predicts_masks(cfg: Config) -> bool:
    """Whether the detector of a config finds masks, not only boxes.

    Args:
        cfg (Config): Config of MMDetection, whose model or test evaluator says it.
    """
    evaluators = cfg.get('test_evaluator') or {}
    evaluators = evaluators if isinstance(evaluators, list | tuple) else [evaluators]
    return any(map(_evaluates_masks, evaluators)) or _has_mask_head(cfg.model)


def _evaluates_masks(evaluator: Mapping) -> bool:
    metric = evaluator.get('metric') or 'bbox'
    return 'segm' in ([metric] if isinstance(metric, str) else metric)


def _has_mask_head(model: Any) -> bool:
    if isinstance(model, Mapping):
        return bool(model.get('mask_head')) or any(map(_has_mask_head, model.values()))
    return isinstance(model, list | tuple) and any(map(_has_mask_head, model))


def _summarize(files: dict, path: str, **needs: bool) -> CocoSummary:
    key = abspath(path), *sorted(needs.items())
    if key not in files:
        summary = files[key] = check_annotations(read_coco(path), path, **needs)
        for note in summary.notes:
            print_log(note, logger='current', level=logging.WARNING)
    return files[key]


def _same(path: str, other: str | None) -> bool:
    return other is not None and abspath(path) == abspath(other)


def _count(summary: CocoSummary, classes: list[str]) -> int:
    return sum(
        number for key, number in summary.objects.items() if summary.categories[key] in classes
    )


def _loads_masks(pipeline: Any) -> bool:
    """Whether a pipeline, or one inside it, reads masks."""
    if isinstance(pipeline, Mapping):
        if str(pipeline.get('type')).endswith('LoadAnnotations') and pipeline.get('with_mask'):
            return True
        pipeline = list(pipeline.values())
    return isinstance(pipeline, list | tuple) and any(map(_loads_masks, pipeline))


def _classes(field: str, dataset: Mapping, kind: Any) -> list[str]:
    """Names of the classes of a data set, as MMEngine will read them."""
    metainfo = dataset.get('metainfo') or {}
    field = f'{field}.metainfo'
    if not isinstance(metainfo, Mapping):
        raise ValueError(f"{field} = {metainfo!r}: write dict(classes=('cat', 'dog')).")
    classes = metainfo.get('classes', kind.METAINFO['classes'])
    advice = (
        f'give a list in the config, or with --cfg-options {field}.classes=FILE a text file with '
        'one name per line'
    )
    if isinstance(classes, str):
        if not isfile(classes):
            # What the command line takes for a text.
            one = f'for this one class write [{classes}], or ' if classes.isidentifier() else ''
            raise ValueError(
                f'{field}.classes = {classes!r} is neither a file nor a list of names; {one}'
                f'{advice}.'
            )
        classes = list_from_file(classes)
        advice = 'write one name per line, and no other lines'
    if not (isinstance(classes, list | tuple) and classes):
        raise ValueError(f'{field}.classes = {classes!r} names no classes; {advice}.')
    odd = next((name for name in classes if not (isinstance(name, str) and name)), None)
    if odd is not None:
        raise ValueError(f'{field}.classes holds {odd!r}, which is not a name; {advice}.')
    twice = next((name for name in classes if list(classes).count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'{field}.classes holds {twice!r} twice; {advice}.')
    return list(classes)


def _check_classes(field: str, classes: list[str], path: str, names: list[str]) -> None:
    found = [name for name in names if name in classes]
    if found == classes:
        return
    problem = 'in another order' if len(found) == len(classes) else 'without some of these'
    raise ValueError(
        f'{field}.metainfo.classes = {_shorten(classes)}, but {path} has the categories '
        f'{_shorten(names)}, {problem}. Set {field}.metainfo=dict(classes=...) to names of the '
        f'file, in its order; with --cfg-options {field}.metainfo.classes=FILE to a text file with '
        'one name per line.'
    )


def _shorten(names: list[str]) -> str:
    shown = ', '.join(map(repr, names[:5]))
    return f'({shown}, ... {len(names)} in all)' if len(names) > 5 else f'({shown})'


def _check_heads(field: str, count: int, model: dict) -> None:
    for name, head in _heads(model, 'model'):
        number = head['num_classes']
        if number != count:
            raise ValueError(
                f'{name}.num_classes = {number}, but {field} has {count} classes. Set it to '
                f'{count}, or {field}.metainfo=dict(classes=...) to {number} names.'
            )


def _heads(model: dict, place: str) -> Iterator[tuple[str, dict]]:
    """The parts of a model that have ``num_classes``, but RPNs, whose class is "object"."""
    if 'num_classes' in model:
        yield place, model
    for key, value in model.items():
        parts = {f'.{key}': value}
        if isinstance(value, list | tuple):
            parts = {f'.{key}.{i}': part for i, part in enumerate(value)}
        for name, part in parts.items():
            if isinstance(part, dict) and key != 'rpn_head':
                yield from _heads(part, place + name)


def _coco_evaluators(field: str, cfg: Config) -> Iterator[tuple[str, dict]]:
    """Evaluators that read a local annotation file, with their place in the config."""
    evaluators = cfg.get(field) or {}
    if not isinstance(evaluators, list | tuple):
        places = {field: evaluators}
    else:
        places = {f'{field}.{i}': evaluator for i, evaluator in enumerate(evaluators)}
    for place, evaluator in places.items():
        path = evaluator.get('ann_file')
        if path and '://' not in path and not evaluator.get('backend_args'):
            if not exists(path):
                raise FileNotFoundError(
                    f'{place}.ann_file = {path!r} does not exist. Set it in the config or with '
                    f'--cfg-options {place}.ann_file=PATH.'
                )
            yield place, evaluator


def _check_evaluator(
    field: str,
    evaluator: dict,
    dataset: str,
    classes: list[str],
    path: str,
    summary: CocoSummary,
    files: dict,
) -> None:
    """Compare a data set and the annotations that its predictions are compared with."""
    if not str(evaluator.get('type')).endswith('CocoMetric'):
        return
    other = evaluator['ann_file']
    annotated = not evaluator.get('format_only')
    masks = annotated and _evaluates_masks(evaluator)
    truth = _summarize(files, other, masks=masks, evaluation=annotated, annotated=annotated)
    if _same(path, other):
        return
    _check_classes(dataset, classes, other, list(truth.categories.values()))
    unknown = [key for key in summary.images if key not in truth.images]
    if unknown:
        raise ValueError(
            f'{field}.ann_file: {other} has no image with id {unknown[0]!r}, which {path} of '
            f'{dataset} has ({len(unknown)} of {len(summary.images)} are missing); name the same '
            'file in both.'
        )


def _check_images(field: str, dataset: dict, path: str, summary: CocoSummary) -> None:
    """Compare the images with what their annotation file says of them."""
    prefix = dataset.get('data_prefix') or {}
    if not isinstance(prefix, Mapping) or 'img' not in prefix:
        raise ValueError(
            f'{field}.data_prefix = {prefix!r}: write dict(img=...), the folder of the images '
            "below data_root; img='' if they are in it."
        )
    folder = join(dataset.get('data_root') or '', prefix['img'] or '')
    if '://' in folder or dataset.get('backend_args'):
        return
    listed: dict[str, set] = {}
    files = {image['file_name']: image for image in summary.images.values()}
    missing = []
    for name in files:
        place, _, last = join(folder, name).rpartition('/')
        if place not in listed:
            listed[place] = set(os.listdir(place or '.')) if exists(place or '.') else set()
        # A file system may know it by another spelling.
        if last not in listed[place] and not exists(join(folder, name)):
            missing.append(name)
    if missing:
        name = missing[0]
        remedy = (
            'set the folder that the names in the file start from with --cfg-options '
            f'{field}.data_prefix.img=PATH, or add the images'
        )
        # As Windows and labelling tools on the web write them.
        meant = {name.replace('\\', '/'), unquote(name)} - {name}
        there = next((other for other in meant if exists(join(folder, other))), None)
        if there:
            remedy = f'in the file, write {there!r} for {name!r}, and the others likewise'
        raise FileNotFoundError(
            f'{field}.data_prefix.img = {prefix["img"]!r}: {abspath(join(folder, name))} does not '
            f'exist ({len(missing)} of the {len(files)} images of {path} are missing); {remedy}.'
        )
    as_stored = _ignores_orientation(dataset.get('pipeline') or ())
    if as_stored is None:
        return
    names = list(files)
    step = max(len(names) // _LOOKED_AT, 1)
    for name in names[::step]:
        found = _read_size(join(folder, name), as_stored)
        annotated = files[name]['height'], files[name]['width']
        if found and found != annotated:
            raise ValueError(
                f'{field}: ' + describe_size_mismatch(join(folder, name), found, annotated)
            )


def _ignores_orientation(pipeline: Sequence[Mapping]) -> bool | None:
    """Whether a pipeline reads images as they are stored; None if it does not say."""
    for transform in pipeline:
        if str(transform.get('type')).endswith('LoadImageFromFile'):
            if transform.get('imdecode_backend') in ('turbojpeg', 'tifffile'):
                return True
            return transform.get('color_type', 'color') not in ('color', 'grayscale')
    return None


def _read_size(path: str, as_stored: bool) -> tuple[int, int] | None:
    """Height and width as OpenCV will read them; None for a file that is not an image."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = not as_stored and image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except (OSError, ValueError, SyntaxError):
        return None
    return (width, height) if turned else (height, width)
