from .ser_vit import SERVisionTransformer

__all__ = ['SERVisionTransformer']
