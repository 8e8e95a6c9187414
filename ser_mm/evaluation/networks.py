"""What an evaluation starts from, out of the config of a run: its backbone, and labelled images."""

import inspect
from collections.abc import Sequence
from copy import deepcopy

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader

from ser_mm.checkpoint import load_backbone, read_weights


def build_backbone(cfg: Config, checkpoint: str | None = None, **overrides) -> nn.Module:
    """The backbone of a config's model, in eval mode, on the device that there is.

    Args:
        cfg (Config): Config of a classifier or of a self-supervised algorithm of MMPretrain, or of
            ``SERAlgorithm``.
        checkpoint (str, optional): Path or URL of its weights, which have to fit completely; see
            :func:`ser_mm.checkpoint.load_backbone`. Defaults to None: untrained, initialized as
            the config says.
        **overrides: Fields of the backbone's config to replace: ``out_type``, ``out_indices``, ...

    Returns:
        nn.Module: Maps images (N, 3, H, W) to a tuple of outputs.

    Raises:
        ValueError: If the model has no backbone of MMPretrain, if the backbone masks its images,
            or if the checkpoint does not fit.
    """
    model = cfg.model.get('algorithm') or cfg.model
    if 'backbone' not in model:
        raise ValueError(
            f"model.type='{model.get('type')}' has no `backbone` in {cfg.filename}; choose the "
            'config of a classifier or of a self-supervised algorithm.'
        )
    backbone = MODELS.build(deepcopy(dict(model.backbone, **overrides)))
    if 'mask' in inspect.signature(backbone.forward).parameters:
        raise ValueError(
            f"model.backbone.type='{model.backbone.type}' masks its images; name the plain network "
            'that has its weights, in a config that inherits this one: model = dict(backbone=dict('
            "_delete_=True, type='VisionTransformer', arch=..., out_type='cls_token'))."
        )
    if checkpoint is None:
        backbone.init_weights()
    else:
        held = any(name.startswith('backbone.') for name in read_weights(checkpoint))
        load_backbone(backbone, checkpoint, prefix='backbone.' if held else None)
    backbone.to(get_device()).train(False)  # returns None in some of MMPretrain's backbones
    return backbone


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
            ``data_preprocessor``, of the model or of the config.
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
    pixels = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    if not pixels:
        raise ValueError(f'data_preprocessor is not in {cfg.filename}; set its mean and std.')
    pixels = {key: pixels[key] for key in ('mean', 'std', 'to_rgb') if key in pixels}
    # In test mode an image that cannot be read is an error: another one would take its place.
    options = dict(test_mode=True, **({} if pipeline is None else dict(pipeline=pipeline)))
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
    preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', **pixels)).to(get_device())
    return preprocessor, loader
