from typing import Literal

import torch
import torch.nn.functional as F
from mmpretrain.datasets.transforms import ResizeEdge
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Positive, checked
from ser_mm.datasets.transforms._image import image_of


@TRANSFORMS.register_module()
@checked
class FastResizeEdge(ResizeEdge):
    """MMPretrain's ``ResizeEdge(backend='pillow')`` on torch's kernels.

    Float32 images may have any channels, and are not cut off; see ``FastRandomResizedCrop``.

    Args:
        scale (int): Pixels of the edge.
        edge (str): 'short', 'long', 'width' or 'height'. Defaults to 'short'.
        backend (str): 'pillow', whose filters these are. Defaults to 'pillow'.
        interpolation (str): 'bilinear' or 'bicubic', antialiased. Defaults to 'bilinear'.
    """

    def __init__(
        self,
        scale: Positive,
        edge: Literal['short', 'long', 'width', 'height'] = 'short',
        backend: Literal['pillow'] = 'pillow',
        interpolation: Literal['bilinear', 'bicubic'] = 'bilinear',
    ) -> None:
        super().__init__(scale, edge, backend, interpolation)

    def _resize_img(self, results: dict) -> None:
        image = image_of(self, results, any_channels=True)
        width, height = (max(1, side) for side in results['scale'])
        batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        out = F.interpolate(batch, (height, width), mode=self.interpolation, antialias=True)
        results['img'] = out[0].permute(1, 2, 0).numpy()
        results['img_shape'] = height, width
        results['scale'] = width, height
        results['scale_factor'] = width / image.shape[1], height / image.shape[0]
