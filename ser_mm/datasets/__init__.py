from .bundled_digits import write_bundled_digits
from .bundled_photos import BundledPhotos, write_bundled_photos
from .transforms import EquivariantViewPipeline, LoadReadableImage

__all__ = [
    'BundledPhotos',
    'EquivariantViewPipeline',
    'LoadReadableImage',
    'write_bundled_digits',
    'write_bundled_photos',
]
