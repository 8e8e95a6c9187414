from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose
from mmpretrain.registry import TRANSFORMS

from ser_mm.geometry import NUM_ELEMENTS, act_on_array

NOT_IN_B2 = -1
"""Stands in the geometry record of an image of b1."""


@TRANSFORMS.register_module()
class EquivariantViewPipeline(BaseTransform):
    """Make the views of an image: by the base policy for b1, or equivariant ones for b2.

    Each image joins b2 with probability ``equi_ratio``, so a batch of B images holds about
    ``equi_ratio * B`` of them, at times none. The views of b1 come from ``views``, as with
    MMPretrain's ``MultiView``. The views of b2 come from one crop, ``equi_crop``, shared by both:
    each view then has its own photometry, ``equi_views``, and its own element of D4, drawn
    uniformly and applied without loss. The resize that completes the group element is drawn once
    per batch, by :class:`~ser_mm.models.SERDataPreprocessor` (paper, Section 3).

    **Required Keys:** img

    **Modified Keys:** img, a list of the views followed by the geometry record: an int64 tensor
    (number of equivariant views,) with the element that moved each of them, -1 in b1. It travels
    with the images through ``PackInputs`` and ``default_collate``.

    Args:
        views (Sequence[list]): Pipeline of each view of b1. All views have the same size, but for
            further ones beyond ``equi_views`` (local crops), which b2 gets as b1 does.
        equi_crop (list): Pipeline that crops an image of b2, to the size of ``views``, square.
        equi_views (Sequence[list]): Photometric pipeline of each view of b2; two of them. Leave
            photometry out of these and of ``views`` to have it done on the device, by
            ``photometry`` of :class:`~ser_mm.models.SERDataPreprocessor`.
        equi_ratio (float): Probability of an image to be in b2. Defaults to 0.01.

    Raises:
        ValueError: If ``equi_ratio`` is outside [0, 1], there are fewer ``views`` than
            ``equi_views``, or ``equi_crop`` gives an image that is not square.
    """

    def __init__(
        self,
        views: Sequence[list],
        equi_crop: list,
        equi_views: Sequence[list],
        equi_ratio: float = 0.01,
    ) -> None:
        if not 0 <= equi_ratio <= 1:
            raise ValueError(
                f'EquivariantViewPipeline: equi_ratio={equi_ratio} is the share of images in b2; '
                'choose it within [0, 1].'
            )
        if len(equi_views) != 2 or len(views) < 2:
            raise ValueError(
                f'EquivariantViewPipeline: got {len(equi_views)} equi_views and {len(views)} '
                'views; give two equi_views, and as many views or more.'
            )
        self.views = [Compose(view) for view in views]
        self.equi_crop = Compose(equi_crop)
        self.equi_views = [Compose(view) for view in equi_views]
        self.equi_ratio = equi_ratio

    def transform(self, results: dict) -> dict:
        """Make the views of one image.

        Args:
            results (dict): With ``img`` of shape (H, W, 3), uint8.

        Returns:
            dict: With ``img`` as described above.
        """
        # Without b2 no random number is drawn beyond those of MultiView, so that the same seed
        # gives the same views.
        in_b2 = self.equi_ratio > 0 and np.random.random() < self.equi_ratio
        record = np.full(len(self.equi_views), NOT_IN_B2)
        images = []
        if in_b2:
            crop = self.equi_crop(deepcopy(results))
            height, width = crop['img'].shape[:2]
            if height != width:
                raise ValueError(
                    f'EquivariantViewPipeline: equi_crop gave an image of {height} x {width}; '
                    'quarter turns need a square one, end it with a crop or resize to one number.'
                )
            record = np.random.randint(NUM_ELEMENTS, size=len(self.equi_views))
            images = [
                act_on_array(view(deepcopy(crop))['img'], element)
                for view, element in zip(self.equi_views, record, strict=True)
            ]
        images += [view(deepcopy(results))['img'] for view in self.views[len(images) :]]
        results['img'] = [*images, torch.from_numpy(record)]
        return results

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(equi_ratio={self.equi_ratio}, views={self.views}, '
            f'equi_crop={self.equi_crop}, equi_views={self.equi_views})'
        )
