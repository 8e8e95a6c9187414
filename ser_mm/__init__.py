"""Soft Equivariance Regularization (SER) for MMPretrain and MMDetection.

Importing the package registers its modules, so a config needs only
``custom_imports = dict(imports=['ser_mm'])``.
"""

import importlib
import importlib.metadata
import re

__version__ = '0.1.0'

# The oldest releases that it works with, and what installs a newer one.
_NEEDED = {
    'torch': ('2.5', "torch>=2.5' torchvision"),
    'numpy': ('1.26', "numpy>=1.26,<3'"),
    'mmengine': ('0.10.7', "mmengine>=0.10.7,<1'"),
    'mmcv': ('2.0.0', "mmcv-lite>=2.0.0,<2.2'"),
    'mmpretrain': ('1.2.0', "mmpretrain>=1.2.0,<2'"),
}


def _check_releases() -> None:
    """Refuse packages that are too old, or absent, before one of them fails by an odd error.

    Raises:
        ImportError: With the package, the release found, the one needed and what installs it.
    """
    for name, (needed, requirement) in _NEEDED.items():
        try:
            found = importlib.import_module(name).__version__
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            if name.startswith('mm') and not _has_original():
                requirement = f"onedl-{name}'"
            raise ImportError(
                f"ser_mm needs {name} >= {needed}, which is not installed: run `pip install '"
                f'{requirement}`.'
            ) from error
        if _numbers(found) < _numbers(needed):
            raise ImportError(
                f'ser_mm needs {name} >= {needed}, but {name} {found} is installed: run `pip '
                f"install '{requirement}`."
            )


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', release)[:3]]


def _has_original() -> bool:
    """Whether OpenMMLab's first releases are installed; the others share their import names."""
    try:
        return bool(importlib.metadata.version('mmengine'))
    except importlib.metadata.PackageNotFoundError:
        return False


_check_releases()

from . import datasets, engine, evaluation, models  # noqa: E402
from .engine.hub import register_model_index  # noqa: E402

__all__ = ['__version__', 'datasets', 'engine', 'evaluation', 'models']

register_model_index()
# Where it was imported from before it moved beside what it measures.
engine.EquivarianceHook = evaluation.EquivarianceHook  # type: ignore[attr-defined]
