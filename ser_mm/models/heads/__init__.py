from .cross_correlation_head import CrossCorrelationHead
from .ser_head import SERHead

__all__ = ['CrossCorrelationHead', 'SERHead']
