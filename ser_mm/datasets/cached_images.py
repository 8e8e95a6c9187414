"""Images of one size in one file, read once from whatever holds them."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from ser_mm.arguments import ModuleCfg, Name, Natural, Positive, checked, filled
from ser_mm.datasets.tar_shards import file_of
from ser_mm.files import locked, replacing
from ser_mm.progress import tell_progress

_LAYOUT = 1  # of the file


@DATASETS.register_module()
@checked
class CachedImages(BaseDataset):
    """The images of another data set, prepared once and kept as bytes in a file.

    The pipeline of ``dataset`` reads an image and brings it to one size. What it gives is written,
    when it is first needed, to a NumPy file in ``folder``, whole or not at all, and mapped into
    memory from then on: processes share it, and no more of it is read than is used. Where the
    images are changed, added or removed, or the pipeline is another, it is written anew. Images
    that cannot be read are left out.

    Labels and classes are those of ``dataset``.

    Args:
        dataset (dict): Config of a data set of MMPretrain's kind, as
            :class:`~ser_mm.datasets.ImageSource` or ``CIFAR10``, with a pipeline without chance,
            and without ``PackInputs``.
        pipeline (Sequence[dict]): Transforms of the kept images, such as ``PackInputs``. Defaults
            to none.
        folder (str | Path): Where the file is written. Defaults to 'data/cached_images'.
        indices (int | Sequence[int], optional): The first images only, or these. Defaults to None:
            all.
        max_refetch (int): See MMEngine's ``BaseDataset``. Defaults to 1000.
        test_mode (bool): Likewise. Defaults to False.
        lazy_init (bool): Likewise. Defaults to False.
        serialize_data (bool): Likewise. Defaults to True.

    Raises:
        ValueError: If the images differ in size, are not bytes, or none can be read.

    Example:
        >>> once = [dict(type='LoadReadableImage'), dict(type='ResizeEdge', scale=64),
        ...         dict(type='CenterCrop', crop_size=64)]
        >>> dataset = dict(type='ImageSource', data_root='data/photos', pipeline=once)
        >>> cached = dict(type='CachedImages', dataset=dataset, pipeline=[dict(type='PackInputs')])
    """

    def __init__(
        self,
        dataset: ModuleCfg,
        pipeline: Sequence[ModuleCfg | Callable] = (),
        folder: Name | Path = 'data/cached_images',
        indices: Positive | Annotated[Sequence[Natural], filled] | None = None,
        max_refetch: Natural = 1000,
        test_mode: bool = False,
        lazy_init: bool = False,
        serialize_data: bool = True,
    ) -> None:
        self.source = dataset
        self.folder = Path(folder).expanduser()
        self.file: Path | None = None
        """The file with the images, when it is known."""
        self._rows: np.ndarray | None = None
        super().__init__(
            ann_file='',
            pipeline=pipeline,
            indices=indices,
            max_refetch=max_refetch,
            test_mode=test_mode,
            lazy_init=lazy_init,
            serialize_data=serialize_data,
        )

    def load_data_list(self) -> list[dict]:
        """Write the file if it is not there, and list its images.

        Returns:
            list[dict]: What the data set says of each, but for ``img``, and its ``row``.

        Raises:
            ValueError: See the class.
        """
        dataset = DATASETS.build(self.source)
        dataset.full_init()
        for key, value in dataset.metainfo.items():
            self._metainfo.setdefault(key, value)
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        setting = _digest(f'{_LAYOUT} {self.source}'.encode())
        name = f'{type(dataset).__name__}_{setting}'
        self.file = self.folder / f'{name}.{_digest(*map(_stamp, infos))}.npy'
        if not self.file.exists():
            # No barrier of the process group: that of GPUs ends after ten minutes, and other
            # machines may have other disks.
            with locked(f'{self.file}.lock', str(self.file), wait=True):
                self._write(dataset, infos, name)
        readable = np.flatnonzero(self.rows['readable']).tolist()
        rest = [{k: v for k, v in info.items() if k != 'img'} for info in infos]
        return [dict(rest[row], row=row) for row in readable]

    @property
    def rows(self) -> np.ndarray:
        """np.ndarray: What the file holds: ``image``, uint8, and whether it was ``readable``."""
        if self._rows is None:
            assert self.file is not None
            self._rows = np.load(self.file, mmap_mode='r')
        return self._rows

    def get_data_info(self, idx: int) -> dict:
        """What is known of an image, and a copy of its pixels, ``img``.

        Args:
            idx (int): Number of the image.

        Returns:
            dict: With ``img``, (H, W, 3), uint8.
        """
        info = super().get_data_info(idx)
        image = self.rows['image'][info.pop('row')].copy()
        return dict(info, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped would be copied.
        return {**vars(self), '_rows': None}

    def _write(self, dataset: BaseDataset, infos: Sequence[dict], name: str) -> None:
        assert self.file is not None
        if self.file.exists():  # by now: another process wrote it
            return
        outdated = set(self.folder.glob(f'{name}.*.npy'))
        told = 'have changed, and are kept anew' if outdated else 'are kept'
        print_log(
            f'{len(infos)} images of {type(dataset).__name__} {told} in {self.file}', 'current'
        )
        rows = None
        with replacing(self.file) as part:
            for i, info in enumerate(tell_progress(infos, len(infos), 'images kept:')):
                made = dataset.pipeline(info)
                if made is None:
                    continue
                image = made.get('img') if isinstance(made, dict) else None
                if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
                    raise ValueError(
                        "CachedImages: dataset.pipeline leaves no image in 'img'; begin it with "
                        'LoadReadableImage, and move PackInputs to pipeline.'
                    )
                image = image if image.ndim == 3 else image[..., None]
                if rows is None:
                    kind = [('image', np.uint8, image.shape), ('readable', bool)]
                    rows = np.lib.format.open_memmap(part, 'w+', kind, (len(infos),))
                    if hasattr(os, 'posix_fallocate'):  # on a full disk an error, not a signal
                        with open(part, 'r+b') as file:
                            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
                self._check(image, rows['image'].shape[1:], info)
                rows[i] = image, True
            if rows is None:
                raise ValueError(
                    f'CachedImages: dataset={self.source}: none of its images is readable.'
                )
            rows.flush()
        for file in outdated:
            file.unlink(missing_ok=True)

    def _check(self, image: np.ndarray, shape: tuple[int, ...], info: dict) -> None:
        if image.dtype != np.uint8 or image.shape != shape:
            place = info.get('img_path', 'an image')
            raise ValueError(
                f'CachedImages: dataset.pipeline makes {" x ".join(map(str, image.shape))} '
                f'{image.dtype} of {place}, but the first image has '
                f'{" x ".join(map(str, shape))} uint8; end it with a resize or a crop to one size.'
            )


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b'\0'.join(parts), digest_size=8).hexdigest()


def _stamp(info: dict) -> bytes:
    """What changes when an image does."""
    if 'img' in info:
        return hashlib.blake2b(np.ascontiguousarray(info['img']).data, digest_size=8).digest()
    path = str(info.get('img_path'))
    try:
        status = os.stat(file_of(path))
    except OSError:  # in a remote store, or missing
        return os.fsencode(path)
    return os.fsencode(f'{path} {status.st_size} {status.st_mtime_ns}')
