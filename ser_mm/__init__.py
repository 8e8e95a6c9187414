"""Soft Equivariance Regularization (SER) for MMPretrain and MMDetection.

Importing the package registers its modules, so a config needs only
``custom_imports = dict(imports=['ser_mm'])``.
"""

import warnings

import mmengine
import torch
from mmengine.utils import digit_version

from . import datasets, engine, evaluation, models
from .engine.hub import register_model_index

__version__ = '0.1.0'

__all__ = ['__version__', 'datasets', 'engine', 'evaluation', 'models']

if digit_version(torch.__version__) >= digit_version('2.6') and (
    digit_version(mmengine.__version__) < digit_version('0.10.8')
):
    warnings.warn(
        f'ser_mm: mmengine {mmengine.__version__} cannot resume a run with torch '
        f'{torch.__version__}; install onedl-mmengine, which goes by the same import name.',
        stacklevel=2,
    )

register_model_index()
# Where it was imported from before it moved beside what it measures.
engine.EquivarianceHook = evaluation.EquivarianceHook  # type: ignore[attr-defined]
