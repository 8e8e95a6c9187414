"""Checks of a config before long work starts; what is wrong is said in one sentence."""

import inspect
import os
from collections.abc import Iterator, Sequence
from numbers import Real
from os.path import abspath, exists, isdir, join

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATASETS
from mmpretrain.datasets import BaseDataset, CustomDataset
from torch.utils.data import DataLoader

from ser_mm.datasets import BundledPhotos, ImageSource
from ser_mm.datasets.image_source import SUFFIXES, check_images

DATALOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')

_FINDS_IMAGES = ('load_data_list', '_find_samples')

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


def check_length(cfg: Config) -> None:
    """Refuse a run without a step, or one without an end.

    Args:
        cfg (Config): Config of the run.

    Raises:
        ValueError: If ``max_epochs`` or ``max_iters`` is not a whole number of at least 1, or
            epochs are counted of a sampler that never ends one.
    """
    for name in ('max_epochs', 'max_iters'):
        length = (cfg.get('train_cfg') or {}).get(name)
        if length is None:
            continue
        if not isinstance(length, Real) or length != length // 1 or length < 1:
            raise ValueError(f'train_cfg.{name} = {length!r} must be a whole number of at least 1.')
        sampler = str(((cfg.get('train_dataloader') or {}).get('sampler') or {}).get('type'))
        if name == 'max_epochs' and sampler.rpartition('.')[2].startswith('InfiniteSampler'):
            raise ValueError(
                f'train_dataloader.sampler.type = {sampler!r} never ends an epoch, but '
                f'train_cfg.max_epochs = {length!r}; take a DefaultSampler, or train by iteration: '
                'train_cfg=dict(by_epoch=False, max_iters=...).'
            )


def check_batches(loader: DataLoader) -> None:
    """Refuse a training loader without a batch.

    Args:
        loader (DataLoader): Of a rank.

    Raises:
        ValueError: With the numbers of images.
    """
    repeats = isinstance(loader.sampler, InfiniteSampler) and len(loader.dataset) > 0
    if len(loader) == 0 and not repeats:
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
    root = os.fspath(dataset.get('data_root') or '')
    # Some data sets make their folder, or download themselves; others live in a remote store.
    if issubclass(kind, BundledPhotos) or 'download' in inspect.signature(kind).parameters:
        return
    if '://' in root or dataset.get('backend_args'):
        return

    if issubclass(kind, ImageSource):
        suffixes, labelled = dataset.get('extensions') or SUFFIXES, dataset.get('with_label', False)
        try:
            check_images(root, dataset.get('split') or 'train', suffixes, labelled)
        except (OSError, ValueError) as error:
            raise type(error)(f'{field}.data_root: {error}') from error
        return

    def fail(key: str, path: str, problem: str, remedy: str = '') -> None:
        remedy = remedy or f'set it in the config or with --cfg-options {field}.{key}=PATH'
        value = f'{field}.{key} = {dataset.get(key)!r}'
        raise FileNotFoundError(f'{value}: {abspath(path)} {problem}; {remedy}.')

    if root and not exists(root):
        fail('data_root', root, 'does not exist')
    ann_file = dataset.get('ann_file')
    expand = os.path.expanduser if issubclass(kind, BaseDataset) else str  # as MMPretrain does
    if ann_file and isinstance(ann_file, str):
        ann_file = expand(ann_file)
        if not exists(join(root, ann_file)):
            fail('ann_file', join(root, ann_file), 'does not exist')
        return
    # One that finds its images otherwise knows what its folder holds.
    if not issubclass(kind, CustomDataset) or any(
        getattr(kind, name) is not getattr(CustomDataset, name) for name in _FINDS_IMAGES
    ):
        return

    # A folder of images: `data_root`, or what `data_prefix` or else `split` names in it.
    split = dataset.get('split') or ''
    if split and exists(join(root, 'meta', f'{split}.txt')):
        return
    prefix = dataset.get('data_prefix') or split
    prefix = prefix.get('img_path', '') if isinstance(prefix, dict) else expand(prefix)
    folder = join(root, prefix)
    key = 'data_root' if root else 'data_prefix'
    suffixes = tuple(suffix.lower() for suffix in dataset.get('extensions') or IMAGE_SUFFIXES)
    if not isdir(folder):
        # A folder of images without the folders train and val.
        flat = root and not field.startswith('test') and _has_image(root, suffixes, False)
        remedy = f'take the images that are there by --data {root}' if flat else ''
        fail(key, folder, 'is not a folder', remedy)
    in_classes = dataset.get('with_label', split != 'test')
    if not _has_image(folder, suffixes, in_classes):
        if in_classes and _has_image(folder, suffixes, False):
            remedy = f'make one for each class, or set {field}.with_label=False to do without'
            fail(key, folder, 'has images, but no sub-folders of images', remedy)
        if closed := _closed_folder(folder):
            raise PermissionError(
                f'{field}.{key} = {dataset.get(key)!r}: {closed} cannot be read: permission '
                'denied; it needs permission to read and to search (chmod u+rx).'
            )
        fail(key, folder, f'has no images ({", ".join(suffixes)})')


def _closed_folder(folder: str) -> str | None:
    """The first folder below one, or itself, that permissions keep closed."""
    errors: list[OSError] = []
    for _ in os.walk(folder, onerror=errors.append):
        pass
    return next((error.filename for error in errors if isinstance(error, PermissionError)), None)


def _has_image(folder: str, suffixes: tuple[str, ...], in_subfolders: bool) -> bool:
    """Whether an image is below a folder, not counting those directly in it if so asked."""
    for place, _, names in os.walk(folder, followlinks=True):
        if in_subfolders and place == folder:
            continue
        if any(n.lower().endswith(suffixes) and not n.startswith('.') for n in names):
            return True
    return False
