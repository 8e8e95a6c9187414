from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmpretrain.datasets.transforms import PackInputs
from mmpretrain.registry import TRANSFORMS
from torch import Tensor, from_numpy

from ser_mm.arguments import Name, checked


@TRANSFORMS.register_module()
@checked
class FastPackInputs(PackInputs):
    """MMPretrain's ``PackInputs``, with channels put first by OpenCV.

    Args:
        input_key (str): Of the image, or the list of views, in ``results``. Defaults to 'img'.
        algorithm_keys (Sequence[str]): What else goes to the algorithm. Defaults to [], nothing.
        meta_keys (Sequence[str]): What is kept about the image; [] for nothing. Defaults to
            PackInputs.DEFAULT_META_KEYS.
    """

    def __init__(
        self,
        input_key: Name = 'img',
        algorithm_keys: Sequence[Name] = (),
        meta_keys: Sequence[Name] = PackInputs.DEFAULT_META_KEYS,
    ) -> None:
        super().__init__(input_key, algorithm_keys, meta_keys)

    @staticmethod
    def format_input(input_: Any) -> Tensor | list[Tensor]:
        """Make tensors.

        Args:
            input_ (Any): An image (H, W, 3), or what else ``PackInputs`` takes, or a list of such.

        Returns:
            Tensor | list[Tensor]: (3, H, W) of an image.
        """
        if isinstance(input_, list):
            return [FastPackInputs.format_input(x) for x in input_]
        colours = isinstance(input_, np.ndarray) and input_.ndim == 3 and input_.shape[2] == 3
        if not colours or input_.dtype != np.uint8:
            return PackInputs.format_input(input_)
        out = np.empty((3, *input_.shape[:2]), np.uint8)
        cv2.split(input_, list(out))
        return from_numpy(out)
