"""Tiny ImageNet, in the layout that it is distributed in."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, checked
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET
from ser_mm.files import write_text

_SIDE = 64


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
                file, _, rest = line.partition('\t')
                name, *box = rest.split('\t')
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


def write_tiny_imagenet_boxes(
    data_root: str | Path,
    folder: str | Path,
    train: int | None = None,
    val: int | None = None,
    class_agnostic: bool = True,
) -> dict[str, dict[str, int]]:
    """Write the boxes of Tiny ImageNet as annotation files in COCO's format.

    ``train.json`` and ``val.json`` name the images by their path below ``data_root``, where they
    stay, and ``classes.txt`` has the categories, one a line. Files that are there and hold the
    same are left as they are, so that the call may be repeated.

    Both ends of a box are within it, so it is x_max - x_min + 1 pixels wide. Images whose box has
    no area (x_max = x_min or y_max = y_min: 434 to train on and 41 to validate on) are left out:
    such a box does not say where the object is.

    Args:
        data_root (str | Path): Folder of the data set, see :class:`TinyImageNet`.
        folder (str | Path): Folder of the files; made if it is not there.
        train (int, optional): Images of each class to train on, the first ones that are not left
            out. Defaults to None: all.
        val (int, optional): Images of each class to validate on. Defaults to None: all.
        class_agnostic (bool): One category for all, 'object', or else one for each class, with its
            wordnet id as name. Defaults to True.

    Returns:
        dict[str, dict[str, int]]: By split, how many ``images`` are in the file and how many were
        ``left_out`` of those that were looked at.

    Raises:
        FileExistsError: If one of the files is there and holds something else.
        FileNotFoundError, ValueError: See :class:`TinyImageNet`; or if ``train`` or ``val`` is
            less than 1.
    """
    root, folder = Path(data_root).expanduser(), Path(folder).expanduser()
    splits: dict[Literal['train', 'val'], int | None] = {'train': train, 'val': val}
    texts: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, per_class in splits.items():
        if per_class is not None and per_class < 1:
            raise ValueError(
                f'write_tiny_imagenet_boxes: {split}={per_class} images of each class; give 1 or '
                'more, or None for all.'
            )
        dataset = TinyImageNet(root, split, lazy_init=True)
        data = dataset.load_data_list()
        names = ('object',) if class_agnostic else dataset.metainfo['classes']
        content, left_out = _as_coco(data, root, per_class, names)
        texts[f'{split}.json'] = json.dumps(content)
        texts['classes.txt'] = ''.join(f'{name}\n' for name in names)
        counts[split] = dict(images=len(content['images']), left_out=left_out)
    files = {folder / name: text for name, text in texts.items()}
    missing = [file for file in files if not file.exists()]
    for file, text in files.items():
        if file not in missing and file.read_text() != text:
            raise FileExistsError(
                f'{file} holds something else; remove it, or choose another folder.'
            )
    for file in missing:
        write_text(file, files[file])
    return counts


def _as_coco(
    data: list[dict], root: Path, per_class: int | None, names: Sequence[str]
) -> tuple[dict[str, list], int]:
    """Content of an annotation file, and how many images were left out of it."""
    taken: Counter = Counter()
    images, annotations, left_out = [], [], 0
    for item in data:
        x_min, y_min, x_max, y_max = item['box']
        label = item['gt_label']
        if taken[label] == per_class:
            continue
        if x_max <= x_min or y_max <= y_min:
            left_out += 1
            continue
        taken[label] += 1
        width, height = x_max - x_min + 1, y_max - y_min + 1
        id = len(images) + 1  # pycocotools counts an annotation with id 0 as missed
        file = Path(item['img_path']).relative_to(root).as_posix()
        images.append(dict(id=id, file_name=file, width=_SIDE, height=_SIDE))
        annotations.append(
            dict(
                id=id,
                image_id=id,
                category_id=label + 1 if len(names) > 1 else 1,
                bbox=[x_min, y_min, width, height],
                area=width * height,
                iscrowd=0,
            )
        )
    categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    return dict(images=images, annotations=annotations, categories=categories), left_out
