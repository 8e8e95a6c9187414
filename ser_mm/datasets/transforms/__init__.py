from .check_image_size import CheckImageSize
from .corrupt import Corrupt
from .equivariant_view_pipeline import EquivariantViewPipeline
from .load_readable_image import LoadReadableImage

__all__ = ['CheckImageSize', 'Corrupt', 'EquivariantViewPipeline', 'LoadReadableImage']
