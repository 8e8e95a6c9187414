from .dino import DINO
from .dino_head import DINOHead
from .dino_neck import DINONeck

__all__ = ['DINO', 'DINOHead', 'DINONeck']
