import numpy as np
from mmcv.transforms import BaseTransform
from mmpretrain.registry import TRANSFORMS

from ser_mm.geometry import NUM_ELEMENTS, act_on_array


@TRANSFORMS.register_module()
class MoveByD4(BaseTransform):
    """Turn and flip an image by one of the eight symmetries of the square, without loss.

    To evaluate on turned images: which element an image gets depends on its place in the data set
    alone, so it is the same for all networks and on all machines. Elements are uniform; an image
    that is not square gets one of the four that keep its shape.

    **Modified keys**: img

    **Required keys**: img, and sample_idx, which MMEngine's data sets give.
    """

    def transform(self, results: dict) -> dict:
        """Move ``img``, (H, W, C).

        Args:
            results (dict): With ``img`` and ``sample_idx``.

        Returns:
            dict: With the moved ``img``.

        Raises:
            ValueError: If the data set does not number its images.
        """
        if 'sample_idx' not in results:
            raise ValueError(
                "MoveByD4: sample_idx is missing, the image's place in the data set; use it in the "
                "pipeline of a data set of MMEngine's kind."
            )
        height, width = results['img'].shape[:2]
        elements = range(0, NUM_ELEMENTS, 1 if height == width else 2)  # even ones: half turns
        # A generator of its own: what others draw stays as it was.
        place = np.random.default_rng(results['sample_idx']).integers(len(elements))
        results['img'] = act_on_array(results['img'], elements[place])
        return results
