from .backbones import SERResNet, SERVisionTransformer
from .data_preprocessor import SERDataPreprocessor
from .dino import DINO, DINOHead, DINONeck
from .foreach_ema import ForeachCosineEMA
from .heads import CrossCorrelationHead, SERHead
from .necks import SERNeck, SimpleFPN
from .ser_algorithm import SERAlgorithm

__all__ = [
    'CrossCorrelationHead',
    'DINO',
    'DINOHead',
    'DINONeck',
    'ForeachCosineEMA',
    'SERAlgorithm',
    'SERDataPreprocessor',
    'SERHead',
    'SERNeck',
    'SERResNet',
    'SERVisionTransformer',
    'SimpleFPN',
]
