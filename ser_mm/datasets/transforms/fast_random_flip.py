from typing import Literal

import cv2
import numpy as np
from mmcv.transforms import RandomFlip
from mmcv.transforms.utils import cache_randomness
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Share, checked

_AXES = dict(horizontal=1, vertical=0, diagonal=-1)


@TRANSFORMS.register_module()
@checked
class FastRandomFlip(RandomFlip):
    """MMCV's ``RandomFlip`` in one direction, of images by OpenCV.

    Args:
        prob (float): Of flipping, 0 to 1.
        direction (str): 'horizontal', 'vertical' or 'diagonal'. Defaults to 'horizontal'.
    """

    def __init__(
        self,
        prob: Share,
        direction: Literal['horizontal', 'vertical', 'diagonal'] = 'horizontal',
    ) -> None:
        super().__init__(float(prob), direction)

    @cache_randomness
    def _choose_direction(self) -> str | None:
        # NumPy's choice, which MMCV asks, compares the same number with the same probability.
        return self.direction if np.random.rand() < self.prob else None

    def _flip(self, results: dict) -> None:
        if results.keys() & {'gt_bboxes', 'gt_keypoints', 'gt_seg_map'}:
            return super()._flip(results)
        image = results['img']
        # OpenCV leaves out the axis of a single channel.
        flipped = cv2.flip(image, _AXES[results['flip_direction']])
        results['img'] = flipped.reshape(image.shape)
