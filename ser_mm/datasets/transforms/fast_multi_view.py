from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any

import numpy as np
from mmpretrain.datasets.transforms import MultiView, RandomResizedCrop, ResizeEdge
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Positive, checked, filled
from ser_mm.datasets.transforms.fast_random_resized_crop import FastRandomResizedCrop

_READERS = (RandomResizedCrop, FastRandomResizedCrop, ResizeEdge)
"""Transforms that never write into their image, nor return a part of it."""


@TRANSFORMS.register_module()
@checked(
    transforms=Annotated[Sequence[Sequence], filled],
    num_views=Positive | Annotated[Sequence[Positive], filled],
)
class FastMultiView(MultiView):
    """MMPretrain's ``MultiView``, without a copy of the whole image for each crop of it.

    Args:
        transforms (Sequence[list]): Pipelines.
        num_views (int | Sequence[int]): How many views each of them makes.

    Raises:
        ValueError: If there are not as many numbers as pipelines.
    """

    def __init__(self, transforms: Sequence[Sequence], num_views: int | Sequence[int]) -> None:
        numbers = np.atleast_1d(np.asarray(num_views)).tolist()
        if len(numbers) != len(transforms):
            raise ValueError(
                f'FastMultiView: num_views={num_views} has {len(numbers)} numbers for '
                f'{len(transforms)} pipelines in transforms; give one for each.'
            )
        super().__init__(list(transforms), numbers)

    def transform(self, results: dict) -> dict:
        """Make the views.

        Args:
            results (dict): With ``img``.

        Returns:
            dict: With ``img``, the list of views.
        """
        results['img'] = [view(results_for(view, results))['img'] for view in self.transforms]
        return results


def results_for(view: Any, results: dict) -> dict:
    """A copy of ``results`` for one of several views of an image.

    Args:
        view (Compose): The pipeline of the view.
        results (dict): With ``img``, which stays as it is.

    Returns:
        dict: A deep copy, but for ``img`` itself if the view begins with a transform that reads
        it and makes a new one.
    """
    transforms = getattr(view, 'pipeline', view).transforms
    image = results['img']
    shared = bool(transforms) and type(transforms[0]) in _READERS
    return deepcopy(results, {id(image): image} if shared else None)
