from .backbones import SERVisionTransformer
from .data_preprocessor import SERDataPreprocessor
from .heads import SERHead
from .necks import SERNeck
from .ser_algorithm import SERAlgorithm

__all__ = [
    'SERAlgorithm',
    'SERDataPreprocessor',
    'SERHead',
    'SERNeck',
    'SERVisionTransformer',
]
