from .check_image_size import CheckImageSize
from .corrupt import Corrupt
from .equivariant_view_pipeline import EquivariantViewPipeline
from .load_readable_image import LoadReadableImage
from .move_by_d4 import MoveByD4

__all__ = [
    'CheckImageSize',
    'Corrupt',
    'EquivariantViewPipeline',
    'LoadReadableImage',
    'MoveByD4',
]
