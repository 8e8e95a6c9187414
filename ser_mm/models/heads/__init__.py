from .augself_head import AugSelfHead
from .cross_correlation_head import CrossCorrelationHead
from .equimod_head import EquiModHead
from .rotation_head import RotationHead
from .ser_head import SERHead
from .stl_head import STLHead

__all__ = [
    'AugSelfHead',
    'CrossCorrelationHead',
    'EquiModHead',
    'RotationHead',
    'SERHead',
    'STLHead',
]
