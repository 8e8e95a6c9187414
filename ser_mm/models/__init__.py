from .backbones import SERResNet, SERTimmStages, SERTimmViT, SERVisionTransformer
from .data_preprocessor import SERDataPreprocessor
from .dino import DINO, DINOHead, DINONeck
from .equivariance_algorithm import EquivarianceAlgorithm
from .foreach_ema import ForeachCosineEMA
from .heads import (
    AugSelfHead,
    CrossCorrelationHead,
    EquiModHead,
    RotationHead,
    SERHead,
    STLHead,
)
from .multi_crop_mocov3 import MultiCropMoCoV3
from .necks import SERNeck, SimpleFPN
from .ser_algorithm import SERAlgorithm

__all__ = [
    'AugSelfHead',
    'CrossCorrelationHead',
    'DINO',
    'DINOHead',
    'DINONeck',
    'EquiModHead',
    'EquivarianceAlgorithm',
    'ForeachCosineEMA',
    'MultiCropMoCoV3',
    'RotationHead',
    'SERAlgorithm',
    'SERDataPreprocessor',
    'SERHead',
    'SERNeck',
    'SERResNet',
    'SERTimmStages',
    'SERTimmViT',
    'SERVisionTransformer',
    'STLHead',
    'SimpleFPN',
]
