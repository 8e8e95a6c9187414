"""Checks of a config before long work starts; what is wrong is said in one sentence."""

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from os.path import abspath, exists, isdir, isfile, join

from mmengine.config import Config
from mmengine.registry import DATASETS
from mmpretrain.datasets import CustomDataset
from torch.utils.data import DataLoader

from ser_mm.datasets import BundledPhotos

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


def check_data(cfg: Config, dataloaders: Sequence[str] = DATALOADERS[:2]) -> None:
    """Fail early, and in one sentence, when the data a config names is missing or has no images.

    Otherwise the same mistake ends in a traceback from inside the data set, after the model was
    built. Only local paths are checked, and no more files than it takes to find one image.
    Wrapped and concatenated data sets are followed.

    Args:
        cfg (Config): Config of the run.
        dataloaders (Sequence[str]): Names of the data loaders to check. Defaults to those
            that training uses.

    Raises:
        FileNotFoundError: Naming the field, its value and the remedy.
    """
    for name in dataloaders:
        for field, dataset in walk_datasets(name, cfg.get(name) or {}):
            check_dataset(field, dataset, cfg.get('default_scope'))


def check_batches(loader: DataLoader) -> None:
    """Refuse a training loader without a batch.

    Args:
        loader (DataLoader): Of a rank.

    Raises:
        ValueError: With the numbers of images.
    """
    if len(loader) == 0:
        raise ValueError(
            f'train_dataloader.batch_size = {loader.batch_size}, but the {len(loader.dataset)} '
            f'images of the data set are {len(loader.sampler)} for each process, which make no '
            'batch; lower it, or take more images.'
        )


def walk_datasets(field: str, cfg: dict) -> Iterator[tuple[str, dict]]:
    """Yield every data set config inside `cfg`, with its place in the config."""
    inner = {'dataset': cfg.get('dataset')}
    inner |= {f'datasets.{i}': dataset for i, dataset in enumerate(cfg.get('datasets') or ())}
    for name, dataset in inner.items():
        if isinstance(dataset, dict):
            yield f'{field}.{name}', dataset
            yield from walk_datasets(f'{field}.{name}', dataset)


def check_dataset(field: str, dataset: dict, scope: str | None = None) -> None:
    """Check the paths of one data set, as far as its class gives them the usual meaning.

    Args:
        field (str): Its place in the config.
        dataset (dict): Its config.
        scope (str, optional): Default scope of the config. Defaults to None.

    Raises:
        FileNotFoundError: Naming the field, its value and the remedy.
    """
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = dataset.get('type')
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if kind is None:
        return
    root = dataset.get('data_root') or ''
    # Some data sets make their folder, or download themselves; others live in a remote store.
    if issubclass(kind, BundledPhotos) or 'download' in inspect.signature(kind).parameters:
        return
    if '://' in root or dataset.get('backend_args'):
        return

    def fail(key: str, path: str, problem: str, remedy: str = '') -> None:
        remedy = remedy or f'set it in the config or with --cfg-options {field}.{key}=PATH'
        value = f'{field}.{key} = {dataset.get(key)!r}'
        raise FileNotFoundError(f'{value}: {abspath(path)} {problem}; {remedy}.')

    if root and not exists(root):
        fail('data_root', root, 'does not exist')
    ann_file = dataset.get('ann_file')
    if ann_file and isinstance(ann_file, str):
        if not exists(join(root, ann_file)):
            fail('ann_file', join(root, ann_file), 'does not exist')
        return
    if not issubclass(kind, CustomDataset):
        return

    # A folder of images: `data_root`, or what `data_prefix` or else `split` names in it.
    split = dataset.get('split') or ''
    if split and exists(join(root, 'meta', f'{split}.txt')):
        return
    prefix = dataset.get('data_prefix') or split
    folder = join(root, prefix.get('img_path', '') if isinstance(prefix, dict) else prefix)
    key = 'data_root' if root else 'data_prefix'
    if not isdir(folder):
        fail(key, folder, 'is not a folder')
    suffixes = tuple(suffix.lower() for suffix in dataset.get('extensions') or IMAGE_SUFFIXES)
    in_classes = dataset.get('with_label', split != 'test')
    if not _has_image(folder, suffixes, in_classes):
        if in_classes and _has_image(folder, suffixes, False):
            remedy = f'make one for each class, or set {field}.with_label=False to do without'
            fail(key, folder, 'has images, but no sub-folders of images', remedy)
        fail(key, folder, f'has no images ({", ".join(suffixes)})')


def _has_image(folder: str, suffixes: tuple[str, ...], in_subfolders: bool) -> bool:
    """Whether an image is below a folder, not counting those directly in it if so asked."""
    for place, _, names in os.walk(folder, followlinks=True):
        if in_subfolders and place == folder:
            continue
        if any(n.lower().endswith(suffixes) and not n.startswith('.') for n in names):
            return True
    return False


def check_coco(cfg: Config, dataloaders: Sequence[str] = DATALOADERS[:2]) -> None:
    """Fail early, in one sentence, when annotations, classes and heads of MMDetection disagree.

    MMDetection itself skips the annotations of classes that a file does not know, and takes
    the labels in the order of the file, whatever the order of the names.

    Args:
        cfg (Config): Config of the run; one of another scope than 'mmdet' is not checked.
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
