"""The backbone of a run, from its config and checkpoint."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmpretrain.models.backbones import ResNet
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.checkpoint import load_backbone
from ser_mm.engine.configs import find_config


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, with the preprocessor that the Runner would give it.

    Args:
        cfg (Config): Config of a run.

    Returns:
        nn.Module: As built, not initialized.
    """
    model = deepcopy(cfg.model)
    inner = (model.get('algorithm') or {}).get('data_preprocessor')
    if cfg.get('data_preprocessor') and not inner:
        model.setdefault('data_preprocessor', deepcopy(cfg.data_preprocessor))
    with _scope(cfg):
        return MODELS.build(model)


def _scope(cfg: Config) -> AbstractContextManager:
    """That of a config, also in a process that has built a detector."""
    return DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmpretrain')


def as_config(cfg: Config | str | Path) -> Config:
    """A config, or that of a file or of a shipped name, see :func:`find_config`."""
    return cfg if isinstance(cfg, Config) else Config.fromfile(find_config(cfg))


def build_backbone(
    cfg: Config | str | Path, checkpoint: str | None = None, **overrides
) -> nn.Module:
    """The backbone of a config's model, in eval mode, on the device that there is.

    Args:
        cfg (Config | str | Path): Config of a classifier or of a self-supervised algorithm of
            MMPretrain, or of ``SERAlgorithm``; or its path, or the name of a shipped one.
        checkpoint (str, optional): Path or URL of its weights, which have to fit completely; see
            :func:`ser_mm.checkpoint.load_backbone`. The start of their names in the file is found,
            or else is ``evaluation.prefix`` of the config. Defaults to None: untrained,
            initialized as the config says.
        **overrides: Fields of the backbone's config to replace: ``out_type``, ``out_indices``, ...

    Returns:
        nn.Module: Maps images (N, 3, H, W) to a tuple of outputs.

    Raises:
        ValueError: If the model has no backbone of MMPretrain, if the backbone masks its images,
            or if the checkpoint does not fit.

    Example:
        >>> backbone = build_backbone('ser_mocov3_vits16', 'epoch_100.pth')
    """
    cfg = as_config(cfg)
    model = cfg.model.get('algorithm') or cfg.model
    if 'backbone' not in model:
        raise ValueError(
            f"model.type='{model.get('type')}' has no `backbone` in {cfg.filename}; choose the "
            'config of a classifier or of a self-supervised algorithm.'
        )
    with _scope(cfg):
        backbone = MODELS.build(deepcopy(dict(model.backbone, **overrides)))
    if 'mask' in inspect.signature(backbone.forward).parameters:
        raise ValueError(
            f"model.backbone.type='{model.backbone.type}' masks its images; name the plain network "
            'that has its weights, in a config that inherits this one: model = dict(backbone=dict('
            "_delete_=True, type='VisionTransformer', arch=..., out_type='cls_token'))."
        )
    if checkpoint is None:
        with _without_a_line_for_each_parameter():
            backbone.init_weights()
    else:
        load_backbone(backbone, checkpoint, (cfg.get('evaluation') or {}).get('prefix'))
    backbone.to(get_device()).train(False)  # returns None in some of MMPretrain's backbones
    return backbone


@contextmanager
def _without_a_line_for_each_parameter() -> Iterator[None]:
    """MMEngine logs how each was initialized, hundreds of lines, where no file takes them."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def start_of(cfg: Config) -> str:
    """What a run of a config begins with: 'weights', or 'untrained' where none are loaded.

    Args:
        cfg (Config): Config of a run.
    """
    return 'weights' if weights_of(cfg) else 'untrained'


def weights_of(cfg: Config) -> list[str]:
    """Checkpoints that the backbone of a config starts from.

    Args:
        cfg (Config): Config of a run.
    """
    given = (cfg.model.get('algorithm') or cfg.model).backbone.get('init_cfg') or ()
    given = given if isinstance(given, list | tuple) else [given]
    return [x['checkpoint'] for x in given if x.get('checkpoint')]


def map_options(backbone: nn.Module) -> dict[str, Any]:
    """Attributes by which a backbone gives the token map after every block or stage.

    Args:
        backbone (nn.Module): Of MMPretrain.

    Returns:
        dict[str, Any]: Their values; none if it is no ViT and no ResNet.
    """
    if hasattr(backbone, 'out_type') and hasattr(backbone, 'num_layers'):
        return dict(out_indices=tuple(range(backbone.num_layers)), out_type='featmap')
    if not isinstance(backbone, ResNet):
        return {}
    options: dict[str, Any] = dict(out_indices=tuple(range(backbone.num_stages)))
    return options | (dict(out_type='featmap') if hasattr(backbone, 'out_type') else {})


@contextmanager
def token_maps_of(backbone: nn.Module) -> Iterator[Callable[[Tensor], tuple[Tensor, ...]]]:
    """Let a backbone give the token map after every block, and leave it as it was.

    Args:
        backbone (nn.Module): Of MMPretrain. A ViT gives the map of the patch tokens after every
            block, a ResNet that of every stage; any other gives what its ``out_indices`` say.

    Yields:
        Callable: Maps images (N, 3, H, W) to a tuple of maps (N, C, h, w), in eval mode.
    """
    options = map_options(backbone)
    before = {name: getattr(backbone, name) for name in options}
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        for name, value in options.items():
            setattr(backbone, name, value)
        backbone.eval()
        yield backbone
    finally:
        for name, value in before.items():
            setattr(backbone, name, value)
        for module, training in modes:
            module.training = training
