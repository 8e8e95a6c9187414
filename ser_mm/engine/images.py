"""A folder or a list of images in place of the data sets that a config names."""

import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmpretrain.datasets import CIFAR10, MNIST, BaseDataset
from mmpretrain.models import BaseClassifier
from mmpretrain.registry import DATASETS, MODELS

from ser_mm.datasets import STL10, ImageSource
from ser_mm.datasets.image_source import (
    SUFFIXES,
    check_images,
    class_folders,
    iterate_images,
    part_of,
)
from ser_mm.engine.checks import walk_datasets

_HOLD_PIXELS = CIFAR10, MNIST, STL10  # their pipelines load nothing


def use_images(
    cfg: Config,
    train: str | Path,
    val: str | Path | None = None,
    labels: bool | None = None,
    splits: Sequence[str] = ('train', 'val'),
) -> None:
    """Let a run train on, and be evaluated with, the images of a folder or a list.

    Each data set keeps its transforms. Where no validation images are there, every fifth image of
    each class is held out for them; self-supervised training sees them, too, without labels.

    Args:
        cfg (Config): Changed in place: the data sets of its loaders and of ``evaluation``.
        train (str | Path): See :class:`~ser_mm.datasets.ImageSource`.
        val (str | Path, optional): Validation images. Defaults to None: the folder ``val`` in
            ``train``, or what is held out of it.
        labels (bool, optional): Whether ``evaluation`` needs labels. Defaults to None: has them if
            the images have.
        splits (Sequence[str]): Keys of ``evaluation`` that will be used; of one alone nothing is
            held out. Defaults to both.

    Raises:
        FileNotFoundError: If there are no images.
        PermissionError: If a folder cannot be read.
        ValueError: If the file is no list, if labels are missing, or if the config has another
            kind of data.
    """
    if cfg.get('default_scope') == 'mmdet':
        raise ValueError(
            'is for images without annotations; set data_root and ann_file of the data sets of '
            f'{cfg.filename} with --cfg-options.'
        )
    train = Path(train).expanduser()
    val = train if val is None else Path(val).expanduser()
    supervised = issubclass(_kind(cfg.model), BaseClassifier)
    needed = bool(supervised or labels)
    for split in splits:
        check_images(train if split == 'train' else val, split, with_label=needed)
    if labels is None:
        labels = _has_labels(train, 'train') and _has_labels(val, 'val')

    def source(split: str, with_label: bool, hold_out: bool) -> dict:
        root = train if split == 'train' else val
        # The same from any folder that names it; links stay, but where '..' leads out of one.
        root = root.resolve() if '..' in root.parts else root.absolute()
        return dict(
            type='mmpretrain.ImageSource',
            data_root=str(root),
            split=split,
            hold_out=hold_out and train == val,
            with_label=with_label,
        )

    both = bool(cfg.get('train_dataloader') and cfg.get('val_dataloader'))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(loader):
            split = loader.partition('_')[0].replace('test', 'val')
            _replace(cfg[loader], loader, source(split, supervised, supervised and both))
    evaluation = cfg.get('evaluation') or {}
    for split in ('train', 'val'):
        if dataset := evaluation.get(split):
            new = source(split, bool(labels), len(splits) > 1)
            holder = ConfigDict(dataset=dataset)
            _replace(holder, f'evaluation.{split}', new)
            evaluation[split] = holder.dataset


def _kind(model: dict) -> type:
    kind = model.get('type')
    return (MODELS.get(kind) if isinstance(kind, str) else kind) or object


def _has_labels(place: Path, split: str) -> bool:
    try:
        check_images(place, split, with_label=True)
    except ValueError:
        return False
    return True


def _replace(loader: ConfigDict, name: str, source: dict) -> None:
    """Put another data set in the place of the innermost one of a loader."""
    holder, place = loader, f'{name}.dataset'
    while 'dataset' in (holder.get('dataset') or {}):
        holder, place = holder.dataset, f'{place}.dataset'
    dataset = holder.get('dataset') or ConfigDict()
    if 'pipeline' not in dataset:
        raise ValueError(
            f'takes the place of a data set with a pipeline, and {place} is '
            f'{dataset.get("type")} without one; set {place} in the config.'
        )
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if kind is not None and issubclass(kind, _HOLD_PIXELS):
        raise ValueError(
            f'takes the place of a data set of files, and {place} is {kind.__name__}, whose '
            "pipeline starts from pixels; take a config of files, such as 'ser_mocov3_vits16', or "
            "set its type to 'CachedImages' (see docs/howto/device_photometry.md)."
        )
    holder.dataset = ConfigDict(source, pipeline=dataset.pipeline)


def check_class_labels(cfg: Config) -> None:
    """Check the labels that a classifier is to be trained and validated on.

    Args:
        cfg (Config): Config of the run; one of another model is not checked.

    Raises:
        ValueError: See :func:`check_labels`.
    """
    if not issubclass(_kind(cfg.model), BaseClassifier):
        return
    datasets = {
        field: dataset
        for name in ('train_dataloader', 'val_dataloader')
        for field, dataset in walk_datasets(name, cfg.get(name) or {})
    }
    check_classes(datasets)
    check_labels(datasets, (cfg.model.get('head') or {}).get('num_classes'))


def check_classes(datasets: dict[str, dict]) -> None:
    """Check that the class folders of data sets are the same, as their order numbers the classes.

    Args:
        datasets (dict[str, dict]): Configs by their place in the config. Those without
            folders are passed over.

    Raises:
        ValueError: Naming a folder that is missing.
    """
    first = None
    for field, dataset in datasets.items():
        folder, names = _class_folders(dataset)
        if not names:  # labels are in a file, as meta/val.txt of ImageNet
            continue
        first = first or (field, folder, names)
        odd = sorted(names ^ first[2])
        if odd:
            raise ValueError(
                f'{field} ({folder}) and {first[0]} ({first[1]}) have different classes: '
                f'{odd[0]} and {len(odd) - 1} more are in one only; use folders with the same.'
            )
    if first and len(first[2]) == 1:
        raise ValueError(
            f'{first[0]} ({first[1]}) has one class, {first[2].pop()}, and two or more are to be '
            'told apart; its sub-folders are the classes.'
        )


def _class_folders(dataset: dict) -> tuple[Path, set[str]]:
    """The folder of a data set, and the names of the classes that its sub-folders are."""
    folder = Path(dataset.get('data_root') or '').expanduser()
    kind = str(dataset.get('type'))
    if kind.endswith('ImageSource'):
        folder, _ = part_of(folder, dataset.get('split') or 'train')
        return folder, class_folders(folder)
    prefix = dataset.get('data_prefix') or dataset.get('split') or ''
    prefix = prefix.get('img_path', '') if isinstance(prefix, dict) else prefix
    folder = folder / prefix
    in_folders = prefix or kind.endswith('CustomDataset')
    labels_in_file = dataset.get('ann_file') or kind.endswith('TinyImageNet')
    if labels_in_file or not in_folders or not folder.is_dir():
        return folder, set()
    return folder, {entry.name for entry in os.scandir(folder) if entry.is_dir()}


def check_labels(datasets: dict[str, dict], num_classes: int | None = None) -> None:
    """Check that the labels of lists and annotation files are counted from 0.

    Args:
        datasets (dict[str, dict]): Configs by their place in the config: those of one run, as a
            part of the classes may be absent from one. Those without a file are passed over.
        num_classes (int, optional): Classes that the labels have to fit. Defaults to None: not
            known.

    Raises:
        ValueError: Naming the file, its smallest and its largest label.
    """
    found = {field: labels for field in datasets if (labels := _labels(field, datasets[field]))}
    together = set().union(*found.values())
    # Labels of a part of the classes, 3 and 7, are not counted from 1.
    from_one = (
        num_classes is None and len(together) > 1 and together == set(range(1, len(together) + 1))
    )
    if num_classes is None and len(together) == 1 < len(found) == len(datasets):
        field = next(iter(found))
        raise ValueError(
            f'{_file_of(field, datasets[field])} has one class, {together.pop()}, and two or more '
            'are to be told apart.'
        )
    for field, labels in found.items():
        said = f'{_file_of(field, datasets[field])} has labels from {min(labels)} to {max(labels)}'
        if from_one:
            raise ValueError(f'{said} and none that is 0; count them from 0: subtract 1 from each.')
        if min(labels) < 0 or (num_classes and max(labels) >= num_classes):
            last = num_classes - 1 if num_classes else 'the number of classes - 1'
            raise ValueError(f'{said}; count them from 0 to {last}.')


def _file_of(field: str, dataset: dict) -> str:
    key = 'ann_file' if dataset.get('ann_file') else 'data_root'
    return f'{field}.{key} = {str(dataset.get(key))!r}'


def _labels(field: str, dataset: dict) -> set[int]:
    """Labels in the file of a data set; none if it has no file or no labels."""
    kind = dataset.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    if kind is None or dataset.get('with_label') is False:
        return set()
    if issubclass(kind, ImageSource):
        root = Path(dataset['data_root']).expanduser()
        if root.is_dir() or not dataset.get('with_label'):
            return set()
        suffixes = dataset.get('extensions') or SUFFIXES
        images = iterate_images(root, suffixes, True)
        return {label for _, label in images if isinstance(label, int)}
    elif not (issubclass(kind, BaseDataset) and dataset.get('ann_file')):
        return set()
    try:
        built = DATASETS.build(dict(dataset, pipeline=[], serialize_data=False))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{_file_of(field, dataset)} cannot be read as a list of images and labels: '
            f'{str(error).rstrip(".")}. '
            'Write a line "PATH LABEL" for each image, or set with_label=False.'
        ) from error
    labels = {info.get('gt_label') for info in getattr(built, 'data_list', ())}
    return {int(label) for label in labels if isinstance(label, Integral)}
