from .ser_head import SERHead

__all__ = ['SERHead']
