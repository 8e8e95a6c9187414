import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import mmcv
import numpy as np

from .bundled_photos import PICTURES, read_picture

CLASSES = tuple('0123456789')
# Pictures with writing in them would hold objects without annotations.
_PICTURES = [name for name in PICTURES if name not in ('page', 'text')]
_VAL_PICTURES = _PICTURES[::4]
_TRAIN_DIGITS = 1200  # of 1797; they are sorted by writer
_MOST_DIGITS = 6


def write_bundled_digits(
    root: str | Path, num_train: int = 400, num_val: int = 100, size: int = 160, seed: int = 0
) -> None:
    """Write handwritten digits on photographs as a COCO data set, boxes and masks, once.

    An image is a crop of a bundled picture, in grey, with one to six of scikit-learn's digits on
    it, 20 to 56 pixels high, brighter or darker than what is below, not overlapping. Training and
    validation share neither a picture nor a digit. The layout is::

        root
        ├── train.json
        ├── train
        │   ├── 000000.png
        │   └── ...
        ├── val.json
        └── val

    The folder appears under its name when it is complete.

    Args:
        root (str | Path): Folder to make. One that holds the same images already is left as it is.
        num_train (int): Training images. Defaults to 400.
        num_val (int): Validation images. Defaults to 100.
        size (int): Side of the square images in pixels. Defaults to 160.
        seed (int): Seed of places, sizes and contrasts. Defaults to 0.

    Raises:
        FileExistsError: If ``root`` is there but holds something else.
    """
    root = Path(root).expanduser()
    info = dict(train=num_train, val=num_val, size=size, seed=seed)
    if _is_written(root, info):
        return
    from sklearn.datasets import load_digits  # slow to import, as is pycocotools below

    digits = load_digits()
    samples = list(zip(digits.images, digits.target, strict=True))
    sources = dict(
        train=([p for p in _PICTURES if p not in _VAL_PICTURES], samples[:_TRAIN_DIGITS]),
        val=(_VAL_PICTURES, samples[_TRAIN_DIGITS:]),
    )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}.', dir=root.parent) as partial:
        folder = Path(partial, root.name)
        for index, (split, (names, own)) in enumerate(sources.items()):
            rng = np.random.default_rng([seed, index])
            pictures = [read_picture(name) for name in names]
            coco: dict[str, Any] = dict(
                info=info,
                images=[],
                annotations=[],
                categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
            )
            for i in range(info[split]):
                name = f'{i:06d}.png'
                image, objects = _compose(pictures[rng.integers(len(pictures))], own, size, rng)
                mmcv.imwrite(image, str(folder / split / name))
                coco['images'].append(dict(id=i, file_name=name, height=size, width=size))
                first = len(coco['annotations'])
                coco['annotations'] += [
                    dict(id=first + j + 1, image_id=i, iscrowd=0, **_annotate(mask, label))
                    for j, (mask, label) in enumerate(objects)
                ]
            (folder / f'{split}.json').write_text(json.dumps(coco))
        try:
            os.rename(folder, root)
        except OSError:  # another process was faster
            if not _is_written(root, info):
                raise


def _is_written(root: Path, info: dict[str, int]) -> bool:
    """Whether ``root`` holds the images of ``info``; an error if it holds anything else."""
    if not root.exists():
        return False
    with suppress(OSError, ValueError, TypeError, KeyError):  # no stamp, or a damaged one
        if all(
            json.loads((root / f'{split}.json').read_text())['info'] == info
            for split in ('train', 'val')
        ):
            return True
    raise FileExistsError(
        f'write_bundled_digits: {root} holds other files already, or damaged ones; remove it, '
        'or choose another folder.'
    )


def _compose(
    picture: np.ndarray, digits: list[tuple], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple]]:
    """An image (size, size), and the mask (size, size) and label of each object on it."""
    y, x = rng.integers(np.subtract(picture.shape, size) + 1)
    image = picture[y : y + size, x : x + size].astype(np.float32)
    taken = np.zeros((size, size), bool)
    objects = []
    for _ in range(rng.integers(1, _MOST_DIGITS + 1)):
        digit, label = digits[rng.integers(len(digits))]
        height = int(rng.integers(20, 57))
        y, x = rng.integers(size - height + 1, size=2)
        place = slice(y, y + height), slice(x, x + height)
        if taken[place].any():
            continue
        taken[place] = True
        ink = mmcv.imresize(
            digit.astype(np.float32) / 16, (height, height), interpolation='bicubic'
        )
        ink = ink.clip(0, 1)
        below = image[place].mean()
        value = below + rng.uniform(80, 120) * (1 if below < 128 else -1)
        image[place] += ink * (value - image[place])
        mask = np.zeros((size, size), np.uint8)
        mask[place] = ink > 0.5
        objects.append((mask, int(label)))
    return image.round().clip(0, 255).astype(np.uint8), objects


def _annotate(mask: np.ndarray, label: int) -> dict:
    """What COCO says of an object."""
    from pycocotools.mask import area, encode, toBbox

    code = encode(np.asfortranarray(mask))
    return dict(
        category_id=label + 1,
        bbox=toBbox(code).tolist(),
        area=float(area(code)),
        segmentation=dict(size=code['size'], counts=code['counts'].decode()),
    )
