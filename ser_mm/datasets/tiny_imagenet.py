"""Tiny ImageNet, in the layout that it is distributed in."""

from pathlib import Path
from typing import Literal

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, checked
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET


@DATASETS.register_module()
@checked(**CUSTOM_DATASET, ann_file=Literal[''], data_prefix=Literal[''])
class TinyImageNet(BaseDataset):
    """Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels, with one box an image.

    As CS231N distributes it (http://cs231n.stanford.edu/tiny-imagenet-200.zip), 100,000 images to
    train on and 10,000 to validate on::

        train/<wordnet id>/images/<wordnet id>_<n>.JPEG, train/<wordnet id>/<wordnet id>_boxes.txt
        val/images/val_<n>.JPEG, val/val_annotations.txt

    Labels are the places of the wordnet ids in ``wnids.txt`` when sorted.

    Args:
        data_root (str | Path): Its folder. Defaults to 'data/tiny-imagenet-200'.
        split (str): 'train' or 'val'. Defaults to 'train'.
        **kwargs: Those of MMPretrain's ``BaseDataset``: pipeline, ...

    Raises:
        FileNotFoundError: If the folder, or one of its files, is missing.
        ValueError: If an annotation is not as described.
    """

    def __init__(
        self,
        data_root: Name | Path = 'data/tiny-imagenet-200',
        split: Literal['train', 'val'] = 'train',
        **kwargs,
    ) -> None:
        self.split = split
        super().__init__(ann_file='', data_root=str(Path(data_root).expanduser()), **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images of the split.

        Returns:
            list[dict]: ``img_path``, ``gt_label`` and ``box``, (x_min, y_min, x_max, y_max) in
            pixels from 0 to 63, both ends within, of each. A few hundred boxes have no area.

        Raises:
            FileNotFoundError: See the class.
            ValueError: See the class.
        """
        root = self.data_root
        names = sorted(self._lines(f'{root}/wnids.txt'))
        self._metainfo.setdefault('classes', tuple(names))
        labels = {name: label for label, name in enumerate(names)}
        images = []
        if self.split == 'val':
            for line in self._lines(f'{root}/val/val_annotations.txt'):
                file, name, *box = line.split('\t')
                images.append((f'{root}/val/images/{file}', name, box))
        else:
            for name in names:
                for line in self._lines(f'{root}/train/{name}/{name}_boxes.txt'):
                    file, *box = line.split('\t')
                    images.append((f'{root}/train/{name}/images/{file}', name, box))
        data = []
        for file, name, box in images:
            if name not in labels or len(box) != 4 or not all(x.isdigit() for x in box):
                raise ValueError(
                    f'TinyImageNet: {file} has class {name!r} and box {box}, '
                    'not one of wnids.txt and four numbers; unpack the data set again.'
                )
            box = tuple(map(int, box))
            data.append(dict(img_path=file, gt_label=labels[name], box=box))
        return data

    def _lines(self, file: str) -> list[str]:
        try:
            return Path(file).read_text().splitlines()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'TinyImageNet: data_root={self.data_root!r}: {file} is missing; unpack '
                'http://cs231n.stanford.edu/tiny-imagenet-200.zip there.'
            ) from error
