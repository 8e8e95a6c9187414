from .ser_resnet import SERResNet
from .ser_timm_stages import SERTimmStages
from .ser_timm_vit import SERTimmViT
from .ser_vit import SERVisionTransformer

__all__ = ['SERResNet', 'SERTimmStages', 'SERTimmViT', 'SERVisionTransformer']
