from .ser_neck import SERNeck
from .simple_fpn import SimpleFPN

__all__ = ['SERNeck', 'SimpleFPN']
