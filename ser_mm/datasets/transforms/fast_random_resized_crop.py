from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from mmpretrain.datasets.transforms import RandomResizedCrop
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Interval, Natural, NaturalFloat, Size, ascending, checked
from ser_mm.datasets.transforms._image import image_of


@TRANSFORMS.register_module()
@checked
class FastRandomResizedCrop(RandomResizedCrop):
    """MMPretrain's ``RandomResizedCrop(backend='pillow')`` on torch's kernels for uint8.

    The same stream of random numbers gives the same boxes. Pixels are those of Pillow within 1 grey
    level of 255 (bilinear) or 2 (bicubic), and further off only where the bicubic kernel leaves the
    range of values in one direction and comes back in the other, as Pillow cuts off in between.
    Float32 images, of any channels, are not cut off.

    Args:
        scale (int | Sequence[int]): Size of the crop, or height and width.
        crop_ratio_range (tuple[float, float]): Share of the area, smallest and largest. Defaults
            to (0.08, 1.0).
        aspect_ratio_range (tuple[float, float]): Width by height. Defaults to (3 / 4, 4 / 3).
        max_attempts (int): Draws of a box that does not fit before the largest in the middle is
            taken; 0 for none. Defaults to 10.
        interpolation (str): 'bilinear' or 'bicubic', antialiased. Defaults to 'bilinear'.
        backend (str): 'pillow', whose filters these are. Defaults to 'pillow'.
    """

    def __init__(
        self,
        scale: Size,
        crop_ratio_range: Annotated[tuple[NaturalFloat, NaturalFloat], ascending] = (0.08, 1.0),
        aspect_ratio_range: Interval = (3 / 4, 4 / 3),
        max_attempts: Natural = 10,
        interpolation: Literal['bilinear', 'bicubic'] = 'bilinear',
        backend: Literal['pillow'] = 'pillow',
    ) -> None:
        super().__init__(
            scale, crop_ratio_range, aspect_ratio_range, max_attempts, interpolation, backend
        )

    def transform(self, results: dict) -> dict:
        """Crop and resize.

        Args:
            results (dict): With ``img``, which is only read.

        Returns:
            dict: With ``img`` and ``img_shape``.
        """
        image = image_of(self, results, any_channels=True)
        top, left, height, width = self.rand_crop_params(image)
        box = image[top : top + height, left : left + width]
        if not box.flags.writeable or min(box.strides) < 0:  # of which torch makes no tensor
            box = box.copy()
        # In this order of operations the strides say channels_last, which has a faster kernel.
        batch = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
        size = tuple(self.scale)
        out = F.interpolate(batch, size, mode=self.interpolation, antialias=True)
        results['img'] = out[0].permute(1, 2, 0).numpy()
        results['img_shape'] = results['img'].shape
        return results
