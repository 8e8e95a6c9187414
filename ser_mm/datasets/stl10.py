"""STL-10, in the layout that it is distributed in."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, checked
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET

_SHAPE = (3, 96, 96)
_CLASSES = (
    *('airplane', 'bird', 'car', 'cat', 'deer'),
    *('dog', 'horse', 'monkey', 'ship', 'truck'),
)


@DATASETS.register_module()
@checked(**CUSTOM_DATASET, ann_file=Literal[''], data_prefix=Literal[''])
class STL10(BaseDataset):
    """STL-10: 100,000 images without labels at 96 x 96 pixels, and ten classes.

    As its authors distribute it (http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz),
    5,000 labelled images to train on and 8,000 to test on beside those without labels::

        unlabeled_X.bin, train_X.bin, train_y.bin, test_X.bin, test_y.bin

    The files are mapped into memory: processes share them, and no more is read than is used.
    Pixels are in RGB order, other than those of image files, so ``to_rgb=False`` belongs to the
    preprocessor.

    Args:
        data_root (str | Path): Its folder. Defaults to 'data/stl10_binary'.
        split (str): 'unlabeled', 'train' or 'test'. Defaults to 'unlabeled'.
        **kwargs: Those of MMPretrain's ``BaseDataset``: pipeline, ... The pipeline starts from
            pixels, with nothing that loads.

    Raises:
        FileNotFoundError: If one of its files is missing.
        ValueError: If a file is cut off, or a label is none of the ten.
    """

    METAINFO = dict(classes=_CLASSES)

    def __init__(
        self,
        data_root: Name | Path = 'data/stl10_binary',
        split: Literal['unlabeled', 'train', 'test'] = 'unlabeled',
        **kwargs,
    ) -> None:
        self.split = split
        self._images: np.ndarray | None = None
        super().__init__(ann_file='', data_root=str(Path(data_root).expanduser()), **kwargs)

    @property
    def images(self) -> np.ndarray:
        """np.ndarray: All of the split, (N, 96, 96, 3), uint8, mapped into memory."""
        if self._images is None:
            # A channel after the other, each column by column.
            self._images = self._map('X', _SHAPE).transpose(0, 3, 2, 1)
        return self._images

    def load_data_list(self) -> list[dict]:
        """List the images of the split.

        Returns:
            list[dict]: ``row`` in the file and, with labels, ``gt_label`` of each.

        Raises:
            FileNotFoundError: See the class.
            ValueError: See the class.
        """
        rows = [dict(row=row) for row in range(len(self.images))]
        if self.split == 'unlabeled':
            return rows
        labels = self._map('y', ())
        if len(labels) != len(rows) or not np.isin(labels, range(1, 11)).all():
            raise ValueError(
                f'STL10: data_root={self.data_root!r}: {self.split}_y.bin has {len(labels)} labels '
                f'from {labels.min(initial=255)} to {labels.max(initial=0)}, not {len(rows)} from '
                '1 to 10; unpack stl10_binary.tar.gz again.'
            )
        return [dict(row, gt_label=int(label) - 1) for row, label in zip(rows, labels, strict=True)]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """What is known of an image, and a copy of its pixels, ``img``.

        Args:
            idx (int): Number of the image.

        Returns:
            dict: With ``img``, (96, 96, 3), uint8.
        """
        info = super().get_data_info(idx)
        image = np.ascontiguousarray(self.images[info.pop('row')])
        return dict(info, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped would be copied.
        return {**vars(self), '_images': None}

    def _map(self, what: str, shape: tuple[int, ...]) -> np.ndarray:
        file = Path(self.data_root) / f'{self.split}_{what}.bin'
        told = f'STL10: data_root={self.data_root!r}: {file} '
        if not file.is_file():
            raise FileNotFoundError(
                f'{told}is missing; unpack '
                'http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz and give its folder.'
            )
        count, rest = divmod(file.stat().st_size, int(np.prod(shape, dtype=int)))
        if rest or not count:
            raise ValueError(
                f'{told}has {file.stat().st_size} bytes, no whole number of images; unpack '
                'stl10_binary.tar.gz again.'
            )
        return np.memmap(file, np.uint8, 'r', shape=(count, *shape))
