import io
import logging
from collections.abc import Iterator
from typing import Literal

from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.logging import print_log
from mmpretrain.registry import TRANSFORMS
from PIL import Image

from ser_mm.arguments import checked
from ser_mm.datasets.tar_shards import is_member


@TRANSFORMS.register_module()
@checked
class LoadReadableImage(LoadImageFromFile):
    """Load an image; skip a file that is not an image, with a warning that names it.

    The data set then draws another image in its place, and stops with an error when it finds none
    (``max_refetch`` of its arguments). Keys and formats are those of mmcv's ``LoadImageFromFile``.

    Where three channels of 8 bits are less than a PNG or TIFF holds, a warning says so, once for
    each thing that is lost: more bits, which are cut off, transparency, or further pages.

    Args:
        to_float32, color_type, imdecode_backend, file_client_args, ignore_empty, backend_args: See
            mmcv's ``LoadImageFromFile``.
        skip (bool): Whether a file that is not an image is skipped; otherwise it is an error, as
            evaluations need it. Defaults to True.
    """

    _told: frozenset[str] = frozenset()

    def __init__(
        self,
        to_float32: bool = False,
        color_type: Literal[
            'color', 'grayscale', 'unchanged', 'color_ignore_orientation'
        ] = 'color',
        imdecode_backend: Literal['cv2', 'pillow', 'turbojpeg', 'tifffile'] = 'cv2',
        file_client_args: dict | None = None,
        ignore_empty: bool = False,
        *,
        backend_args: dict | None = None,
        skip: bool = True,
    ) -> None:
        super().__init__(
            to_float32,
            color_type,
            imdecode_backend,
            file_client_args,
            ignore_empty,
            backend_args=backend_args,
        )
        self.skip = skip

    def transform(self, results: dict) -> dict | None:
        """Load ``img_path``.

        Args:
            results (dict): With ``img_path``.

        Returns:
            dict | None: With ``img``, ``img_shape`` and ``ori_shape``; None for an unreadable file
            that is skipped.

        Raises:
            Exception: Of such a file with ``skip=False``, by its format.
        """
        path = results['img_path']
        try:
            loaded = super().transform(results)
        except Exception as error:
            if not self.skip:
                raise
            _warn(f'Skipped an unreadable image, {path}: {error}')
            return None
        if self.color_type == 'color' and str(path).lower().endswith(('.png', '.tif', '.tiff')):
            for kind, sentence in _lost(str(path)):
                if kind not in self._told:
                    self._told |= {kind}
                    _warn(f'{path} {sentence}.')
        return loaded


def _warn(sentence: str) -> None:
    print_log(sentence, logger='current', level=logging.WARNING)


def _lost(path: str) -> Iterator[tuple[str, str]]:
    """Kinds of what a file holds beyond three channels of 8 bits, and a sentence on each."""
    try:
        opened = io.BytesIO(fileio.get(path)) if is_member(path) else open(path, 'rb')
        with opened as file:
            if path.lower().endswith('.png'):  # of which Pillow does not tell the bits
                *_, bits, colour = file.read(26)
                pages, alpha = 1, colour in (4, 6)
            else:
                image = Image.open(file)
                bits = max(getattr(image, 'tag_v2', {}).get(258, (8,)))  # BitsPerSample
                pages, alpha = getattr(image, 'n_frames', 1), 'A' in image.getbands()
    except (OSError, ValueError):
        return  # elsewhere than in a local file, or a TIFF that Pillow does not know
    if bits > 8:
        yield (
            'bits',
            f'has {bits} bits a channel, and the upper 8 of 16 are read, so that data of 12 bits '
            'is next to black; stretch such images to 8 bits before, by '
            "skimage.exposure.rescale_intensity(image, out_range='uint8'), say, or load them by "
            'LoadChannels, as `ser-mm pretrain` does where most images are like that',
        )
    if alpha:
        yield (
            'alpha',
            'has an alpha channel, which is left out, so that transparent parts show the '
            'colour stored there; paint such images on a background before, if that matters',
        )
    if pages > 1:
        yield (
            'pages',
            f'has {pages} pages, and the first is read; write the others to files of their own to '
            'have them too',
        )
