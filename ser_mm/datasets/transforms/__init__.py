from .check_image_size import CheckImageSize
from .corrupt import Corrupt
from .equivariant_view_pipeline import EquivariantViewPipeline
from .fast_multi_view import FastMultiView
from .fast_pack_inputs import FastPackInputs
from .fast_photometry import (
    FastColorJitter,
    FastGaussianBlur,
    FastRandomGrayscale,
    FastSolarize,
)
from .fast_random_flip import FastRandomFlip
from .fast_random_resized_crop import FastRandomResizedCrop
from .fast_resize_edge import FastResizeEdge
from .load_channels import LoadChannels
from .load_readable_image import LoadReadableImage
from .move_by_d4 import MoveByD4

__all__ = [
    'CheckImageSize',
    'Corrupt',
    'EquivariantViewPipeline',
    'FastColorJitter',
    'FastGaussianBlur',
    'FastMultiView',
    'FastPackInputs',
    'FastRandomFlip',
    'FastRandomGrayscale',
    'FastRandomResizedCrop',
    'FastResizeEdge',
    'FastSolarize',
    'LoadChannels',
    'LoadReadableImage',
    'MoveByD4',
]
