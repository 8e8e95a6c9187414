import inspect
import zlib

import numpy as np
from mmcv.transforms import BaseTransform
from mmpretrain.registry import TRANSFORMS

from ser_mm.arguments import Name, Positive, checked

SEVERITIES = (1, 2, 3, 4, 5)
"""Of the corruptions of ImageNet-C."""


@TRANSFORMS.register_module()
@checked
class Corrupt(BaseTransform):
    """Corrupt an image as in ImageNet-C, by the ``imagecorruptions`` package.

    The noise depends on the path of the image, the corruption and the severity alone. The
    published images went through a JPEG of quality 85 after that, these do not.

    **Modified keys**: img

    Args:
        corruption (str): Name, e.g. 'defocus_blur'.
        severity (int): 1 to 5.

    Raises:
        ImportError: If ``imagecorruptions`` is missing.
        ValueError: If the corruption or the severity is unknown.
    """

    def __init__(self, corruption: Name, severity: Positive) -> None:
        try:
            from imagecorruptions import corrupt, corruption_dict
        except ImportError as error:
            raise ImportError(
                'Corrupt: corruptions on the fly need `pip install imagecorruptions-imaug`; '
                'or name the folder of ImageNet-C.'
            ) from error
        if corruption not in corruption_dict or severity not in SEVERITIES:
            raise ValueError(
                f"Corrupt: corruption='{corruption}', severity={severity}: choose one of "
                f'{", ".join(corruption_dict)}, and 1 to 5.'
            )
        self.corrupt = corrupt
        self.corruption = corruption
        self.severity = severity
        self.takes_seed = 'seed' in inspect.signature(corruption_dict[corruption]).parameters

    def transform(self, results: dict) -> dict:
        """Corrupt ``img``, (H, W, 3), uint8, of at least 32 x 32.

        Args:
            results (dict): With ``img`` and, of a file, ``img_path``: what is drawn depends on
                the path, and on the pixels of an image without one. Images of files are BGR, as
                the readers give them; those without a path are RGB, as of CIFAR.

        Returns:
            dict: With the corrupted ``img``.
        """
        image = results['img']
        if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
            raise ValueError(
                f'Corrupt: an image is {" x ".join(map(str, image.shape))}, and corruptions are '
                'for (H, W, 3) of 32 x 32 or more; load color images, and crop or resize them to '
                '32 or more.'
            )
        order = -1 if results.get('img_path') else 1
        path = results.get('img_path') or zlib.crc32(np.ascontiguousarray(image).data)
        name = f'{path} {self.corruption} {self.severity}'
        seed = zlib.crc32(name.encode())
        state = np.random.get_state()
        np.random.seed(seed)  # some corruptions draw from this one, others take a seed
        try:
            image = self.corrupt(
                np.ascontiguousarray(image[..., ::order]),
                severity=self.severity,
                corruption_name=self.corruption,
                **(dict(seed=seed) if self.takes_seed else {}),
            )
        finally:
            np.random.set_state(state)
        results['img'] = np.ascontiguousarray(image[..., ::order])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(corruption='{self.corruption}', severity={self.severity})"
