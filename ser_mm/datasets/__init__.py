from .bundled_digits import write_bundled_digits
from .bundled_photos import BundledPhotos, write_bundled_photos
from .collate import default_collate
from .exact_split import ExactSplit, split_batches
from .sequence_folder import SequenceFolder
from .transforms import Corrupt, EquivariantViewPipeline, LoadReadableImage

__all__ = [
    'BundledPhotos',
    'Corrupt',
    'EquivariantViewPipeline',
    'ExactSplit',
    'LoadReadableImage',
    'SequenceFolder',
    'default_collate',
    'split_batches',
    'write_bundled_digits',
    'write_bundled_photos',
]
