from .ser_resnet import SERResNet
from .ser_vit import SERVisionTransformer

__all__ = ['SERResNet', 'SERVisionTransformer']
