import json
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Literal

import mmcv
import numpy as np
from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import Name, Natural, Positive, checked
from ser_mm.datasets._custom_dataset import CUSTOM_DATASET

# Photographs, textures and micrographs inside the wheels of scikit-image and scikit-learn; the
# other pictures that these packages offer would have to be downloaded.
PICTURES = dict(
    astronaut='skimage.data/astronaut.png',
    brick='skimage.data/brick.png',
    camera='skimage.data/camera.png',
    chelsea='skimage.data/chelsea.png',
    china='sklearn.datasets.images/china.jpg',
    coffee='skimage.data/coffee.png',
    coins='skimage.data/coins.png',
    flower='sklearn.datasets.images/flower.jpg',
    grass='skimage.data/grass.png',
    gravel='skimage.data/gravel.png',
    hubble_deep_field='skimage.data/hubble_deep_field.jpg',
    ihc='skimage.data/ihc.png',
    moon='skimage.data/moon.png',
    motorcycle='skimage.data/motorcycle_left.png',
    page='skimage.data/page.png',
    retina='skimage.data/retina.jpg',
    rocket='skimage.data/rocket.jpg',
    text='skimage.data/text.png',
)

_LONGER_SIDE = 640
_STRIPES = 5
_CANDIDATES = 4
_STAMP = 'bundled_photos.json'


def write_bundled_photos(
    root: str | Path,
    crop_size: int = 64,
    train_per_picture: int = 200,
    val_per_picture: int = 100,
    seed: int = 0,
) -> None:
    """Cut crops out of the bundled pictures and write them as JPEG files, once.

    Each picture, in grey (its colours alone would tell most of them), is cut across its longer
    side into five stripes: the second and the fourth give the validation crops, the others the
    training crops, so no pixel is in both. Of four places drawn for a crop, the one with the most
    contrast is taken: empty sky tells nothing. The layout is ImageNet's::

        root
        ├── train
        │   ├── astronaut
        │   │   ├── 000.jpg
        │   │   └── ...
        │   └── ...
        └── val
            └── ...

    The folder appears under its name when it is complete, so an interrupted write leaves nothing
    that a later call would take for the data, and of two processes that write at once one wins.

    Args:
        root (str | Path): Folder to make. One that holds the same crops already is left as it is.
        crop_size (int): Side of the square crops in pixels. Defaults to 64.
        train_per_picture (int): Training crops of each picture. Defaults to 200.
        val_per_picture (int): Validation crops of each picture. Defaults to 100.
        seed (int): Seed of the crops' places. Defaults to 0.

    Raises:
        FileExistsError: If ``root`` is there but holds something else, or crops that were made
            with other arguments.
        ValueError: If ``crop_size`` exceeds a side of the smallest stripe.
    """
    root = Path(root).expanduser()
    counts = dict(train=train_per_picture, val=val_per_picture)
    stamp = dict(pictures=list(PICTURES), crop_size=crop_size, **counts, seed=seed)
    if _is_written(root, stamp):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}.', dir=root.parent) as partial:
        folder = Path(partial, root.name)
        for index, name in enumerate(PICTURES):
            rng = np.random.default_rng([seed, index])
            stripes = _stripes(name)
            for split, own in dict(train=stripes[0::2], val=stripes[1::2]).items():
                for i in range(counts[split]):
                    crop = _draw_crop(own, crop_size, rng)
                    mmcv.imwrite(crop, str(folder / split / name / f'{i:03d}.jpg'))
        (folder / _STAMP).write_text(json.dumps(stamp, indent=1))
        try:
            os.rename(folder, root)
        except OSError:
            if not _is_written(root, stamp):
                raise


def _is_written(root: Path, stamp: dict) -> bool:
    """Whether ``root`` holds the crops of ``stamp``; an error if it holds anything else."""
    if not root.is_dir() or not any(root.iterdir()):
        return False
    path = root / _STAMP
    if not path.exists():
        raise FileExistsError(
            f'BundledPhotos: {root} holds other files already; set another `data_root`.'
        )
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FileExistsError(
            f'BundledPhotos: {path} cannot be read ({error}); remove {root}, which is written '
            'again then, or set another `data_root`.'
        ) from error
    differing = [
        f'{key}={found.get(key)} instead of {stamp[key]}'
        for key in stamp
        if found.get(key) != stamp[key]
    ]
    if differing:
        raise FileExistsError(
            f'BundledPhotos: {root} holds crops of {", ".join(differing)}; remove it or set '
            'another `data_root`.'
        )
    return True


def read_picture(name: str) -> np.ndarray:
    """A bundled picture in grey, (H, W), uint8, its longer side at most 640 pixels."""
    package, file = PICTURES[name].split('/')
    content = (files(package) / file).read_bytes()
    picture = mmcv.imfrombytes(content, flag='grayscale', backend='pillow')
    if max(picture.shape) > _LONGER_SIDE:
        picture = mmcv.imrescale(picture, (_LONGER_SIDE, _LONGER_SIDE), interpolation='area')
    return picture


def _stripes(name: str) -> list[np.ndarray]:
    """The stripes of a picture, each (H, W)."""
    picture = read_picture(name)
    return np.array_split(picture, _STRIPES, axis=int(np.argmax(picture.shape)))


def _draw_crop(stripes: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """A square crop (size, size) from one of the stripes."""
    crops = []
    for _ in range(_CANDIDATES):
        stripe = stripes[rng.integers(len(stripes))]
        room = np.subtract(stripe.shape, size)
        if room.min() < 0:
            raise ValueError(
                f'BundledPhotos: crop_size={size} does not fit a stripe of {stripe.shape[0]} x '
                f'{stripe.shape[1]} pixels; choose a smaller one.'
            )
        y, x = rng.integers(room + 1)
        crops.append(stripe[y : y + size, x : x + size])
    return max(crops, key=np.std)


@DATASETS.register_module()
@checked(**CUSTOM_DATASET, data_prefix=Literal[''])
class BundledPhotos(CustomDataset):
    """Crops of real pictures that come with scikit-image and scikit-learn; no download.

    The label of a crop is the picture that it was cut from. The crops are written to ``data_root``
    when they are first needed, see :func:`write_bundled_photos`, and read from there like ImageNet.

    Args:
        data_root (str): Folder of the crops. Defaults to 'data/bundled_photos'.
        split (str): 'train' or 'val'. Defaults to 'train'.
        crop_size (int): Side of the crops in pixels. Defaults to 64.
        train_per_picture (int): Training crops of each picture. Defaults to 200.
        val_per_picture (int): Validation crops of each picture. Defaults to 100.
        seed (int): Seed of the crops' places, 0 or more. Defaults to 0.
        **kwargs: Those of MMPretrain's ``CustomDataset``: pipeline, ...

    Raises:
        ValueError: If ``split`` is neither 'train' nor 'val', or a number is not positive.
    """

    METAINFO = dict(classes=tuple(PICTURES))

    def __init__(
        self,
        data_root: Name | os.PathLike = 'data/bundled_photos',
        split: Literal['train', 'val'] = 'train',
        crop_size: Positive = 64,
        train_per_picture: Positive = 200,
        val_per_picture: Positive = 100,
        seed: Natural = 0,
        **kwargs,
    ) -> None:
        self.crops = dict(
            crop_size=crop_size,
            train_per_picture=train_per_picture,
            val_per_picture=val_per_picture,
            seed=seed,
        )
        super().__init__(data_root=data_root, data_prefix=split, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Write the crops if they are not there, and list those of the split.

        Returns:
            list[dict]: ``img_path`` and ``gt_label`` of each crop.
        """
        # No barrier of the process group: not every rank need build this. Of several that write
        # at once one wins.
        write_bundled_photos(self.data_root, **self.crops)
        return super().load_data_list()
