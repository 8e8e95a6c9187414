"""The labelled images that an evaluation looks at, from the config of a run."""

from collections.abc import Iterator, Sequence

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ser_mm.engine.checks import check_dataset
from ser_mm.engine.images import check_classes, check_labels
from ser_mm.evaluation.reading import read_batches, refuse
from ser_mm.models.data_preprocessor import pixels_of
from ser_mm.progress import tell_progress


def dataset_of(cfg: Config, split: str) -> dict:
    """The config of the data set ``evaluation[split]``.

    Raises:
        ValueError: If there is none.
    """
    dataset = (cfg.get('evaluation') or {}).get(split)
    if not dataset:
        raise ValueError(
            f'evaluation.{split} is not in {cfg.filename}; set it to a labelled data set: '
            "dict(type='CustomDataset', data_root=..., pipeline=[...])."
        )
    return dataset


def evaluation_pipeline(cfg: Config) -> list[dict]:
    """What a config does to the images of an evaluation.

    Args:
        cfg (Config): Config of a run.

    Returns:
        list[dict]: Transforms of ``evaluation.val``, or else of ``test_dataloader``; none where
        there is neither.
    """
    places = (
        (cfg.get('evaluation') or {}).get('val'),
        (cfg.get('test_dataloader') or {}).get('dataset'),
    )
    found = ((place or {}).get('pipeline') for place in places)
    return next((list(pipeline) for pipeline in found if pipeline is not None), [])


def begins_by_loading(pipeline: Sequence[dict]) -> bool:
    """Whether transforms begin with one that loads a file; others are of images in memory.

    Args:
        pipeline (Sequence[dict]): Configs of transforms.
    """
    return bool(pipeline) and str(pipeline[0]['type']).rpartition('.')[2].startswith('Load')


def build_loader(
    cfg: Config,
    split: str,
    batch_size: int = 256,
    num_workers: int = 0,
    pipeline: Sequence[dict] | None = None,
) -> tuple[nn.Module, DataLoader]:
    """Labelled images, in the order of the data set, and what makes them the network's input.

    Of several ranks, rank r of W gets images r, r + W, ...: each image once, so ranks may differ
    by one in how many they get.

    Args:
        cfg (Config): With the data set as ``evaluation[split]``, and the normalization as
            ``data_preprocessor`` of the model, of the algorithm in it, or of the config.
        split (str): 'train', 'val' or another key of ``cfg.evaluation``.
        batch_size (int): Images per batch of a rank. Defaults to 256.
        num_workers (int): Processes that read images, 0 for none but this one. Defaults to 0.
        pipeline (Sequence[dict], optional): Transforms instead of those of the data set.
            Defaults to None.

    Returns:
        tuple: The preprocessor, on the device, and the loader of its batches.

    Raises:
        ValueError: If the config says nothing of the split or of the normalization.
    """
    dataset = dataset_of(cfg, split)
    preprocessor = build_preprocessor(cfg)
    # In test mode an image that cannot be read is an error: another one would take its place.
    options = dict(test_mode=True, **({} if pipeline is None else dict(pipeline=pipeline)))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmpretrain'):
        loader = Runner.build_dataloader(
            dict(
                batch_size=batch_size,
                num_workers=num_workers,
                dataset=dict(dataset, **options),
                # Without a seed the sampler draws one, for all ranks together.
                sampler=dict(type='DefaultSampler', shuffle=False, round_up=False, seed=0),
                collate_fn=dict(type='default_collate'),
            )
        )
    return preprocessor, loader


def build_preprocessor(cfg: Config) -> nn.Module:
    """What makes collated images the network's input: channel order, mean and std of a config.

    Args:
        cfg (Config): With ``data_preprocessor``, of the model, of the algorithm in it, or of the
            config.

    Returns:
        nn.Module: MMPretrain's ``ClsDataPreprocessor``, on the device that there is.

    Raises:
        ValueError: If the config says nothing of the normalization, or of mean and std one alone.
    """
    found = [
        place.get('data_preprocessor') or {}
        for place in (cfg.model, cfg.model.get('algorithm') or {}, cfg)
    ]
    if not any(found):
        raise ValueError(f'data_preprocessor is not in {cfg.filename}; set its mean and std.')
    # As in training: that of the model is laid over that of the algorithm in it, mean and std
    # together, and MMEngine takes that of the config where the model has none.
    near = [x for x in found[:2] if x] or found[2:]
    pixels = next(filter(None, (pixels_of(str(cfg.filename), x) for x in near)), {})
    pixels |= next(({'to_rgb': x['to_rgb']} for x in near if 'to_rgb' in x), {})
    return MODELS.build(dict(type='mmpretrain.ClsDataPreprocessor', **pixels)).to(get_device())


def spaced_indices(total: int, count: int) -> list[int]:
    """Places at equal distances in a data set.

    Args:
        total (int): Items of the data set.
        count (int): Places, at most.
    """
    count = min(count, total)
    return [i * total // count for i in range(count)]


def spaced_images(
    cfg: Config, split: str, count: int, batch_size: int = 64, num_workers: int = 0
) -> Iterator[Tensor]:
    """Images of a data set, at equal distances in its order, as the network takes them.

    Args:
        cfg (Config): With ``evaluation``, see :func:`~ser_mm.evaluation.build_loader`.
        split (str): Key of ``cfg.evaluation``.
        count (int): Images, at most.
        batch_size (int): Images per batch. Defaults to 64.
        num_workers (int): Processes that read images. Defaults to 0.

    Yields:
        Tensor: Images, (N, 3, H, W), on the device.

    Raises:
        ValueError: If an image cannot be read; it is named.
    """
    for batch in _spaced_batches(cfg, split, count, batch_size, num_workers):
        yield batch['inputs']


def spaced_labelled(
    cfg: Config, split: str, count: int, batch_size: int = 64, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a data set as :func:`spaced_images` gives them, with their labels.

    Yields:
        tuple: Images, (N, 3, H, W), on the device, and labels, (N,), on the CPU.

    Raises:
        ValueError: If an image cannot be read; it is named.
    """
    for batch in _spaced_batches(cfg, split, count, batch_size, num_workers):
        yield batch['inputs'], torch.tensor([int(x.gt_label) for x in batch['data_samples']])


def _spaced_batches(
    cfg: Config, split: str, count: int, batch_size: int, num_workers: int
) -> Iterator[dict]:
    preprocessor, loader = build_loader(cfg, split, num_workers=num_workers)
    indices = spaced_indices(len(loader.dataset), count)
    batches = read_batches(loader, indices, batch_size)
    if is_main_process():
        batches = tell_progress(batches, -(-len(indices) // batch_size), f'{split}: batch')
    for batch in batches:
        refuse(split, batch.unreadable, len(indices))
        yield preprocessor(batch.content)


def check_evaluation(
    cfg: Config, splits: Sequence[str] = ('train', 'val'), labelled: bool = True
) -> None:
    """Check what a config says of the images, before long work that ends with them.

    Args:
        cfg (Config): With ``evaluation``.
        splits (Sequence[str]): Keys of it that will be used.
        labelled (bool): Whether labels are needed. Defaults to True.

    Raises:
        FileNotFoundError: If data is missing.
        ValueError: If a split is not in the config, has no labels, counts them from 1, or the
            class folders of the splits are not the same.
    """
    datasets = {f'evaluation.{split}': dataset_of(cfg, split) for split in splits}
    for field, dataset in datasets.items():
        check_dataset(field, dataset, cfg.get('default_scope') or 'mmpretrain')
        if labelled and dataset.get('with_label') is False:
            raise ValueError(
                f'{field}.with_label = False, but labels are needed; give labelled images with '
                '--data or in the config.'
            )
        unlabelled = dataset.get('split', 'unlabeled') == 'unlabeled'  # what STL10 takes by default
        if labelled and unlabelled and str(dataset.get('type')).endswith('STL10'):
            raise ValueError(
                f"{field}.split = 'unlabeled', but labels are needed; set it to 'train' or 'test'."
            )
    if labelled:
        check_classes(datasets)
        check_labels(datasets)
