import logging
from typing import Literal

from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import checked


@TRANSFORMS.register_module()
@checked(
    color_type=Literal['color', 'grayscale', 'unchanged', 'color_ignore_orientation'],
    imdecode_backend=Literal['cv2', 'pillow', 'turbojpeg', 'tifffile'],
)
class LoadReadableImage(LoadImageFromFile):
    """Load an image; skip a file that is not an image, with a warning that names it.

    The data set then draws another image in its place, and stops with an error when it finds none
    (``max_refetch`` of its arguments). Arguments, keys and formats are those of mmcv's
    ``LoadImageFromFile``.
    """

    def transform(self, results: dict) -> dict | None:
        """Load ``img_path``.

        Args:
            results (dict): With ``img_path``.

        Returns:
            dict | None: With ``img``, ``img_shape`` and ``ori_shape``; None for an unreadable file.
        """
        try:
            return super().transform(results)
        except Exception as error:
            print_log(
                f'Skipped an unreadable image, {results["img_path"]}: {error}',
                logger='current',
                level=logging.WARNING,
            )
            return None
