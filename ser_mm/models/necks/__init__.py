from .ser_neck import SERNeck

__all__ = ['SERNeck']
