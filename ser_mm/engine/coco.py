"""What a detection config and its annotation files have to agree on."""

import json
from collections.abc import Iterator, Sequence
from os.path import isfile, join

from mmengine.config import Config

from ser_mm.engine.runtime import DATALOADERS, walk_datasets


def check_coco(cfg: Config, dataloaders: Sequence[str] = DATALOADERS[:2]) -> None:
    """Fail early, in one sentence, when annotations, classes and heads of MMDetection disagree.

    MMDetection itself passes over the annotations of classes that a file does not know, and takes
    the labels in the order of the file, whatever the order of the names.

    Args:
        cfg (Config): Config of the run; one of another scope than 'mmdet' is not looked at.
        dataloaders (Sequence[str]): Names of the data loaders to look at. Defaults to those
            that training uses.

    Raises:
        FileNotFoundError: If an annotation file that an evaluator names is missing.
        ValueError: If a data set's classes are not those of its file, in the file's order, or
            their number is not the ``num_classes`` of a head.
    """
    if cfg.get('default_scope') != 'mmdet':
        return
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    for loader in dataloaders:
        for field, dataset in walk_datasets(loader, cfg.get(loader) or {}):
            kind = dataset.get('type')
            kind = DATASETS.get(kind) if isinstance(kind, str) else kind
            if kind and issubclass(kind, CocoDataset):
                metainfo = dataset.get('metainfo') or kind.METAINFO
                classes = metainfo.get('classes') or kind.METAINFO['classes']
                path = join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
                _check_classes(field, list(classes), path)
                _check_heads(field, len(classes), cfg.model)
        evaluator = loader.replace('dataloader', 'evaluator')
        _check_evaluator(evaluator, cfg.get(evaluator))


def _check_classes(field: str, classes: list[str], path: str) -> None:
    if not isfile(path):  # in a remote store; check_data tells of one that is missing
        return
    names = _category_names(path)
    found = [name for name in names if name in classes]
    if found == classes:
        return
    problem = 'in another order' if len(found) == len(classes) else 'without some of these'
    raise ValueError(
        f'{field}.metainfo.classes = {_shorten(classes)}, but {path} has the categories '
        f'{_shorten(names)}, {problem}. Set {field}.metainfo=dict(classes=...) to names of the '
        'file, in its order.'
    )


def _category_names(path: str) -> list[str]:
    """Names of the categories of a COCO file, without parsing its hundreds of MB of polygons."""
    with open(path) as file:
        text = file.read()
    start = text.find('[', text.rfind('"categories"'))
    return [category['name'] for category in json.JSONDecoder().raw_decode(text, start)[0]]


def _shorten(names: list[str]) -> str:
    shown = ', '.join(map(repr, names[:5]))
    return f'({shown}, ... {len(names)} in all)' if len(names) > 5 else f'({shown})'


def _check_heads(field: str, count: int, model: dict) -> None:
    for name, num_classes in _heads(model, 'model'):
        if num_classes != count:
            raise ValueError(
                f'{name}.num_classes = {num_classes}, but {field} has {count} classes. Set it to '
                f'{count}, or {field}.metainfo=dict(classes=...) to {num_classes} names.'
            )


def _heads(model: dict, place: str) -> Iterator[tuple[str, int]]:
    """The parts of a model that have ``num_classes``, but RPNs, whose class is "object"."""
    if 'num_classes' in model:
        yield place, model['num_classes']
    for key, value in model.items():
        parts = {f'.{key}': value}
        if isinstance(value, list | tuple):
            parts = {f'.{key}.{i}': part for i, part in enumerate(value)}
        for name, part in parts.items():
            if isinstance(part, dict) and key != 'rpn_head':
                yield from _heads(part, place + name)


def _check_evaluator(field: str, evaluators: dict | list | None) -> None:
    for evaluator in evaluators if isinstance(evaluators, list | tuple) else [evaluators or {}]:
        path = evaluator.get('ann_file')
        if path and '://' not in path and not evaluator.get('backend_args') and not isfile(path):
            raise FileNotFoundError(
                f'{field}.ann_file = {path!r} does not exist. Set it in the config or with '
                f'--cfg-options {field}.ann_file=PATH.'
            )
