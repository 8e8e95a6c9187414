"""Features of all images of a folder in one file, with the names of the images."""

import json
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
from mmengine.config import Config, ConfigDict
from mmpretrain.registry import DATASETS

from ser_mm.datasets.image_source import check_images
from ser_mm.datasets.tar_shards import name_of
from ser_mm.evaluation.backbone import as_config
from ser_mm.evaluation.data import begins_by_loading, evaluation_pipeline
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.files import replacing

FORMATS = ('.npy', '.safetensors', '.parquet')
"""Suffixes of files of features."""

_SPLIT = 'images'
# What safetensors allows for all that is not numbers, less some room.
_MOST_METADATA = 99_000_000


def embed_folder(
    cfg: Config | str | Path,
    checkpoint: str | None,
    data: str | Path,
    out: str | Path,
    cache_dir: str | Path = 'work_dirs/features',
    blocks: int = 1,
    layer: int | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> tuple[np.ndarray, list[str]] | None:
    """Write the features of all images of a folder, or of a list, and their names to a file.

    Images are prepared as the config prepares those of an evaluation. The features are those of
    :class:`~ser_mm.evaluation.Embedder`, extracted by
    :class:`~ser_mm.evaluation.features.CachedFeatures`: the same call goes on after an
    interruption, and of several ranks each extracts its share.

    Args:
        cfg (Config | str | Path): Config of a run, its path, or the name of a shipped one.
        checkpoint (str, optional): Its weights; read as data. None for the untrained network.
        data (str | Path): Folder or list, see :class:`~ser_mm.datasets.ImageSource`; of a folder
            all images, also where it has parts train and val.
        out (str | Path): File to write, whole or not at all, see :func:`write_features`.
        cache_dir (str | Path): Folder of what was extracted before. Defaults to
            'work_dirs/features'.
        blocks (int): See :class:`~ser_mm.evaluation.Embedder`. Defaults to 1.
        layer (int, optional): See :class:`~ser_mm.evaluation.Embedder`. Defaults to None.
        batch_size (int): Images per batch of a rank. Defaults to 256.
        num_workers (int): Processes that read images. Defaults to 0.

    Returns:
        tuple: Features, float32, (N, C) or with ``layer`` (N, C, h, w), and the names of the
        images: paths relative to the folder, or to that of the list. Rows are in the order of the
        names, those of a list in its own. None on ranks that only helped to extract.

    Raises:
        FileNotFoundError: If there are no images.
        ImportError: If the file needs a package that is not installed.
        ValueError: If ``out`` has another suffix, if config, checkpoint, ``blocks`` and ``layer``
            do not go together, or if images cannot be read; it names them, and the others' features
            are kept.

    Example:
        >>> embed_folder('ser_mocov3_vits16', 'epoch_100.pth', 'my images', 'features.npy')
    """
    check_format(out, layer is not None)
    check_images(data, 'all')
    cfg = deepcopy(as_config(cfg))
    pipeline = evaluation_pipeline(cfg)
    if not pipeline:
        raise ValueError(
            f'{cfg.filename} does not say how images are prepared; set evaluation.val to a data '
            'set with a pipeline.'
        )
    if not begins_by_loading(pipeline):
        raise ValueError(
            f'{cfg.filename} prepares images that are in memory, by {pipeline[0]["type"]}; set '
            'evaluation.val to a data set whose pipeline begins with LoadImageFromFile.'
        )
    place = Path(data).expanduser().absolute()
    dataset = dict(
        type='mmpretrain.ImageSource', data_root=str(place), split='all', with_label=False
    )
    cfg.evaluation = ConfigDict(cfg.get('evaluation') or {}, **{_SPLIT: dataset})
    names = _names(dataset, place)
    check_names(out, names)
    cfg.evaluation[_SPLIT].pipeline = pipeline
    source = CachedFeatures(cfg, checkpoint, cache_dir, blocks, batch_size, num_workers, layer)
    found = source.load(_SPLIT, main_only=True)
    if found is None:
        return None
    features = found[0].numpy()
    if _names(dataset, place) != names:
        raise ValueError(
            f'{data}: images came or went while features were extracted; the same command extracts '
            'those of what is there now.'
        )
    if place.is_dir():
        order = sorted(range(len(names)), key=names.__getitem__)
        features, names = features[order], [names[i] for i in order]
    write_features(out, features, names)
    return features, names


def _names(dataset: dict, place: Path) -> list[str]:
    """Paths of the images of a data set, relative to its folder or to that of its list."""
    listed = DATASETS.build(dict(dataset, pipeline=[]))
    root = f'{place if place.is_dir() else place.parent}{os.sep}'
    paths = (listed.get_data_info(i)['img_path'] for i in range(len(listed)))
    return [name_of(path).removeprefix(root) for path in paths]


def check_format(file: str | Path, maps: bool = False) -> None:
    """Check that features can be written to a file, before the work.

    Args:
        file (str | Path): File that :func:`write_features` is to write.
        maps (bool): Whether they are maps. Defaults to False.

    Raises:
        ImportError: If a package is not installed.
        IsADirectoryError: If there is a folder of this name.
        ValueError: If the suffix is none of :data:`FORMATS`, or a format has no maps.
    """
    file = Path(file)
    if file.suffix not in FORMATS:
        raise ValueError(f'{file}: features are written as {", ".join(FORMATS)}; name such a file.')
    if file.is_dir():
        raise IsADirectoryError(f'{file} is a folder; name a file.')
    if file.suffix != '.parquet':
        return
    if maps:
        raise ValueError(f'{file}: a column has no maps; write them as .npy or .safetensors.')
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{file} needs pyarrow, which is not installed: run `pip install pyarrow`, or write '
            'the features as .npy or .safetensors.'
        ) from error


def check_names(file: str | Path, names: list[str]) -> None:
    """Check that a format can hold names of images, before the work.

    Args:
        file (str | Path): File that :func:`write_features` is to write.
        names (list[str]): Names of images.

    Raises:
        ValueError: If there are too many, or one is no text.
    """
    suffix = Path(file).suffix
    # The header is JSON that holds JSON.
    if suffix == '.safetensors' and len(json.dumps(json.dumps(names))) > _MOST_METADATA:
        raise ValueError(
            f'{file}: {len(names)} names are more than this format holds; write the features as '
            '.npy or .parquet.'
        )
    if suffix == '.parquet':
        odd = next((x for x in names if x != x.encode(errors='replace').decode()), None)
        if odd is not None:
            raise ValueError(
                f'{file}: the name {odd!r} is not in UTF-8; rename the image, or write the '
                'features as .npy or .safetensors.'
            )


def write_features(file: str | Path, features: np.ndarray, names: list[str]) -> None:
    """Write features and the names of their images to a file, whole or not at all.

    - ``.npy``: the features; beside it ``.names.json``, a list.
    - ``.safetensors``: the tensor ``features``; ``names`` in its metadata, a list in JSON.
    - ``.parquet``: the columns ``name`` and ``feature``.

    Args:
        file (str | Path): File to write; its folder is made if it is not there.
        features (np.ndarray): Shape (N, C), or maps (N, C, h, w), but for ``.parquet``.
        names (list[str]): One for each of the N.

    Raises:
        ImportError, ValueError: See :func:`check_format`.
    """
    file = Path(file)
    check_format(file, features.ndim > 2)
    features = np.ascontiguousarray(features)  # others are written in the order of their memory
    if file.suffix == '.npy':
        # Both are complete before one gets its name.
        with replacing(file.with_suffix('.names.json')) as beside, replacing(file) as part:
            beside.write_text(json.dumps(names, indent=0))
            np.save(part, features)
        return
    with replacing(file) as part:
        if file.suffix == '.safetensors':
            from safetensors.numpy import save_file

            save_file(dict(features=features), part, metadata=dict(names=json.dumps(names)))
        else:
            import pyarrow
            import pyarrow.parquet

            width = features.shape[1]
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), width)
            table = pyarrow.table(dict(name=pyarrow.array(names, 'string'), feature=column))
            pyarrow.parquet.write_table(table, part)
