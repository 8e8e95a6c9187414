"""The compiled operators of mmcv: MMDetection needs them, nothing else here does."""

import importlib
import importlib.util
from pathlib import Path

import torch  # noqa: F401  (mmcv._ext links against it)
from mmengine.config import Config

from .configs import find_config

COMPILE = (
    "pip install 'setuptools<81' wheel ninja packaging && pip install --no-build-isolation "
    '--no-deps --no-cache-dir --force-reinstall onedl-mmcv'
)
"""What compiles the operators in an environment that holds torch and a C++ compiler."""


def require_operators(what: str) -> None:
    """Check that MMDetection can run; ``import mmdet`` succeeds without the operators, too.

    Args:
        what (str): What needs MMDetection, as the error's sentence starts.

    Raises:
        ImportError: If mmcv's compiled operators or MMDetection are missing.
    """
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise ImportError(
            f"{what} needs mmcv's compiled operators, which "
            f'{"are not installed" if missing else f"do not load ({error})"}: run `make '
            f'env-operators` in a checkout, or else `{COMPILE}`.'
        ) from error
    if importlib.util.find_spec('mmdet') is None:
        raise ImportError(
            f'{what} needs MMDetection, which is not installed: run `make env-operators` in a '
            'checkout, or else `pip install onedl-mmdetection`.'
        )


def read_config(name: str | Path) -> Config:
    """Read a config that may need MMDetection.

    Args:
        name (str | Path): See :func:`~ser_mm.engine.configs.find_config`.

    Returns:
        Config: With what it inherits.

    Raises:
        FileNotFoundError: If there is no such config.
        ImportError: If it needs MMDetection, which cannot run: see :func:`require_operators`.
    """
    try:
        cfg = Config.fromfile(find_config(name))
    except ModuleNotFoundError as error:
        if str(error).startswith('mmdet '):  # it inherits from MMDetection
            require_operators(f'config {name}')
        raise
    if cfg.get('default_scope') == 'mmdet':
        require_operators(f'config {name}')
    return cfg
