"""Soft Equivariance Regularization (SER) for MMPretrain and MMDetection.

Importing the package registers its modules, so a config needs only
``custom_imports = dict(imports=['ser_mm'])``.
"""

from . import datasets, engine, models

__version__ = '0.1.0'

__all__ = ['__version__', 'datasets', 'engine', 'models']
