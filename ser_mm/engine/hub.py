"""The shipped pretraining configs among MMPretrain's models."""

from functools import cache

from mmpretrain.apis.model import ModelHub

from .configs import CONFIG_ROOT


@cache
def register_model_index() -> None:
    """Let MMPretrain list and build the models of the shipped pretraining configs.

    ``import ser_mm`` calls it; a package without its configs registers nothing.

    Example:
        >>> from mmpretrain import get_model, list_models
        >>> list_models('ser_mocov3_vit')
        ['ser_mocov3_vitb16', 'ser_mocov3_vits16', 'ser_mocov3_vits16_device_views']
        >>> model = get_model('ser_mocov3_vits16')  # untrained: no weights are published
    """
    root = CONFIG_ROOT.parent
    if (root / 'model-index.yml').is_file():
        ModelHub.register_model_index(root / 'model-index.yml', config_prefix=root)
