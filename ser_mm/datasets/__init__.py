from .bundled_digits import write_bundled_digits
from .bundled_photos import BundledPhotos, write_bundled_photos
from .cached_images import CachedImages
from .coco import CocoSummary, check_annotations, read_coco
from .collate import default_collate
from .exact_split import ExactSplit, split_batches
from .image_source import ImageSource
from .paired_draws import PairedDraws, pair_batches
from .sequence_folder import SequenceFolder
from .stl10 import STL10
from .tiny_imagenet import TinyImageNet, write_tiny_imagenet_boxes
from .transforms import (
    CheckImageSize,
    Corrupt,
    EquivariantViewPipeline,
    FastColorJitter,
    FastGaussianBlur,
    FastMultiView,
    FastPackInputs,
    FastRandomFlip,
    FastRandomGrayscale,
    FastRandomResizedCrop,
    FastResizeEdge,
    FastSolarize,
    LoadChannels,
    LoadReadableImage,
    MoveByD4,
)

__all__ = [
    'STL10',
    'BundledPhotos',
    'CachedImages',
    'CheckImageSize',
    'CocoSummary',
    'Corrupt',
    'EquivariantViewPipeline',
    'ExactSplit',
    'FastColorJitter',
    'FastGaussianBlur',
    'FastMultiView',
    'FastPackInputs',
    'FastRandomFlip',
    'FastRandomGrayscale',
    'FastRandomResizedCrop',
    'FastResizeEdge',
    'FastSolarize',
    'ImageSource',
    'LoadChannels',
    'LoadReadableImage',
    'MoveByD4',
    'PairedDraws',
    'SequenceFolder',
    'TinyImageNet',
    'check_annotations',
    'default_collate',
    'pair_batches',
    'read_coco',
    'split_batches',
    'write_bundled_digits',
    'write_bundled_photos',
    'write_tiny_imagenet_boxes',
]
