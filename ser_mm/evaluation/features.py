"""Features of a data set by a frozen network, extracted once on all ranks and kept on disk."""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.device import get_device
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    get_dist_info,
)
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import TRANSFORMS
from torch import Tensor, nn

from ser_mm.checkpoint import read_bytes
from ser_mm.datasets import LoadChannels
from ser_mm.datasets.tar_shards import file_of
from ser_mm.evaluation.backbone import as_config, build_backbone, map_options
from ser_mm.evaluation.data import (
    begins_by_loading,
    build_loader,
    build_preprocessor,
    dataset_of,
)
from ser_mm.evaluation.metrics import check_finite
from ser_mm.evaluation.reading import ReadBatch, Unreadable, read_batches, refuse
from ser_mm.files import read_kept, replacing
from ser_mm.progress import tell_progress


class Embedder(nn.Module):
    """A backbone and what turns its outputs into one vector per image.

    With ``blocks=1`` the vector is the last output: a [CLS] token, or a map averaged over its
    places. With more, the [CLS] tokens of the last blocks of a ViT side by side, each through the
    final norm, which is DINO's protocol for the linear probe. With ``layer`` it is no vector, but
    a token map.

    Args:
        cfg (Config | str | Path): Config of a run, its path, or the name of a shipped one, see
            :func:`~ser_mm.evaluation.build_backbone`.
        checkpoint (str, optional): Its weights. Defaults to None: untrained.
        blocks (int): Last blocks to take. Defaults to 1.
        head (nn.Linear, optional): Give the class that a copy of it finds in the vector, instead
            of the vector. Defaults to None.
        layer (int, optional): Give the map (C, h, w) of the patch tokens after this block of a ViT,
            or of this stage of a ResNet, counted from 1. Defaults to None.

    Raises:
        ValueError: If ``blocks`` or ``layer`` is not in the network, or an output is no vector and
            no map.

    Example:
        >>> embedder = Embedder('ser_mocov3_vits16', 'epoch_100.pth')
        >>> features = embedder.embed(['a.jpg', 'b.jpg'])  # (2, 384)
    """

    def __init__(
        self,
        cfg: Config | str | Path,
        checkpoint: str | None = None,
        blocks: int = 1,
        head: nn.Linear | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        cfg = as_config(cfg)
        self.backbone = build_backbone(cfg, checkpoint)
        if blocks != 1:
            take_last_blocks(self.backbone, blocks)
        if layer is not None:
            if blocks > 1 or head:
                raise ValueError(f'layer={layer} is a map, without blocks={blocks} and a head.')
            self._give_map(layer)
        self.blocks, self.layer = blocks, layer
        self.set_head(head)
        self._cfg = cfg

    @torch.no_grad()
    def embed(
        self,
        images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray],
        batch_size: int = 64,
    ) -> Tensor:
        """Features of images, prepared as the config's ``evaluation.val`` prepares them.

        Args:
            images (str | Path | np.ndarray | Sequence): A file or an array, or several
                of them. Arrays are (H, W, 3), uint8, BGR, or RGB where the config loads no files,
                as of CIFAR; with ``LoadChannels`` in the config, (H, W, C), of values as in the
                files, RGB.
            batch_size (int): Images at one time. Defaults to 64.

        Returns:
            Tensor: Shape (N, C), classes (N,) with a head, or maps (N, C, h, w) with ``layer``; on
            the CPU.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If there is no image, something is no image, the config says nothing of
                transforms or normalization, or a file is given to one that loads none.
        """
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim < 4:
            images = [images]
        if not len(images):
            raise ValueError('Embedder.embed: there is no image; give files or arrays.')
        pipeline = deepcopy(dataset_of(self._cfg, 'val')['pipeline'])
        load = TRANSFORMS.build(pipeline.pop(0)) if begins_by_loading(pipeline) else None
        prepared = Compose([TRANSFORMS.build(x) for x in pipeline])
        preprocessor = build_preprocessor(self._cfg)

        def prepare(image: str | Path | np.ndarray) -> dict:
            if not isinstance(image, str | Path | np.ndarray):
                raise ValueError(
                    f'Embedder.embed: an image is a {type(image).__name__}; give its file, or an '
                    'array (H, W, 3), uint8, BGR or RGB by the config.'
                )
            if isinstance(image, np.ndarray):
                size = image.shape[:2]
                if isinstance(load, LoadChannels):
                    image = load.scale(image)
                elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                    raise ValueError(
                        f'Embedder.embed: an array has shape {image.shape} and values of '
                        f'{image.dtype}; give (H, W, 3), uint8.'
                    )
                return prepared(dict(img=image, img_shape=size, ori_shape=size))
            if load is None:
                raise ValueError(
                    f'Embedder.embed: {image} is a file, and evaluation.val of the config has '
                    'images in memory and loads none; give arrays (H, W, 3), uint8, RGB.'
                )
            return prepared(load(dict(img_path=str(image))))

        features = []
        for start in range(0, len(images), batch_size):
            batch = default_collate([prepare(x) for x in images[start : start + batch_size]])
            features.append(self(preprocessor(batch)['inputs']).cpu())
        return torch.cat(features)

    def set_head(self, head: nn.Linear | None) -> None:
        """Give the class that a copy of ``head`` finds from now on, or the vector if it is None."""
        self.head = head and deepcopy(head).to(get_device())

    def _give_map(self, layer: int) -> None:
        """Let the backbone give the map after a layer."""
        options = map_options(self.backbone)
        if not options:
            raise ValueError(
                f'layer={layer}: maps are given by ViTs and ResNets, and this is '
                f'{type(self.backbone).__name__}; leave it out.'
            )
        depth = len(options['out_indices'])
        if not 1 <= layer <= depth:
            raise ValueError(f'layer={layer} is not in the network; choose 1 to {depth}.')
        for name, value in dict(options, out_indices=[layer - 1]).items():
            setattr(self.backbone, name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) as vectors (N, C) or maps, or classify them (N,).

        Class -1 is of vectors that are not finite.
        """
        outputs = self.backbone(images)
        if self.layer is not None:
            return outputs[-1]
        vectors = vectors_of(self.backbone, outputs, self.blocks)
        if not self.head:
            return vectors
        classes = self.head(vectors).argmax(dim=1)
        return classes.where(vectors.isfinite().all(dim=1), -1)


def take_last_blocks(backbone: nn.Module, blocks: int) -> None:
    """Let a ViT give the [CLS] tokens of its last blocks, for :func:`vectors_of`.

    Args:
        backbone (nn.Module): Of MMPretrain, changed in place.
        blocks (int): Of at least 1.

    Raises:
        ValueError: If ``blocks`` is below 1, or it is no ViT, or has [CLS] in fewer blocks.
    """
    if blocks < 1:
        raise ValueError(f'blocks={blocks}: one of the last blocks is needed; use 1 or more.')
    if not isinstance(backbone, VisionTransformer):
        raise ValueError(
            f'blocks={blocks}: the last blocks can be joined for a ViT only, and this is '
            f'{type(backbone).__name__}; use blocks=1.'
        )
    depth = backbone.num_layers
    with_cls = 0 if backbone.cls_token is None else depth - getattr(backbone, 'cls_layer', 0)
    if blocks > with_cls:
        raise ValueError(
            f'blocks={blocks}: [CLS] is in the last {with_cls} blocks of the network; use that '
            'many at most.'
        )
    backbone.out_type = 'cls_token'
    backbone.out_indices = list(range(depth - blocks, depth))


def vectors_of(backbone: nn.Module, outputs: Any, blocks: int = 1) -> Tensor:
    """One vector for each image, from what a backbone gave for them, see :class:`Embedder`.

    Args:
        backbone (nn.Module): Of MMPretrain.
        outputs (Any): Tensors, one after another, or one tensor.
        blocks (int): Last outputs to take. Defaults to 1.

    Returns:
        Tensor: Shape (N, C).

    Raises:
        ValueError: If an output is no vector and no map.
    """
    outputs = outputs[-blocks:] if isinstance(outputs, (tuple, list)) else [outputs]
    if blocks > 1 and backbone.final_norm:
        outputs = [*(backbone.ln1(x) for x in outputs[:-1]), outputs[-1]]
    if isinstance(outputs[-1], (tuple, list)):  # [CLS] and distillation token, map and [CLS]
        outputs = outputs[-1]
    vectors = [x.mean(dim=(2, 3)) if x.ndim == 4 else x for x in outputs]
    if not hasattr(backbone, 'out_type'):  # maps laid flat, (N, C, L)
        vectors = [x.mean(dim=2) if x.ndim == 3 else x for x in vectors]
    odd = next((x for x in vectors if x.ndim != 2), None)
    if odd is not None:
        raise ValueError(
            f'The backbone gives {tuple(odd.shape)} for {len(odd)} images, not a vector or a map '
            "for each; set --cfg-options model.backbone.out_type='cls_token' "
            '(model.algorithm.backbone... with SERAlgorithm).'
        )
    return torch.cat(vectors, dim=1)


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    preprocessor: Callable[[dict], dict],
    batches: Iterable[dict],
    labelled: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features and labels of a data set, by a network in eval mode.

    What a feature is, the network's own ``out_type`` and ``out_indices`` decide: [CLS] tokens
    (N, C), token maps (N, C, h, w), ... The features of several ``out_indices`` are concatenated
    along the channels.

    Args:
        backbone (nn.Module): Called with images; returns a tuple of tensors or one tensor. It
            is left in the mode that it was in.
        preprocessor (Callable): Makes a batch the network's input, on the network's device, e.g.
            MMPretrain's ``ClsDataPreprocessor``.
        batches (Iterable[dict]): Collated batches with ``inputs`` and labelled ``data_samples``, as
            a data loader of MMPretrain gives them. ``inputs`` of sequences are (N, T, 3, H, W).
        labelled (bool): Whether the images have labels; -1 takes their place. Defaults to True.

    Returns:
        tuple: Features, shape (N, C) or (N, C, h, w), of sequences (N, T, ...), and labels, shape
        (N,), both on the CPU.
    """
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    try:
        for batch in batches:
            sequences = batch['inputs'].shape[:2] if batch['inputs'].ndim == 5 else None
            if sequences:
                batch = dict(batch, inputs=batch['inputs'].flatten(0, 1))
            batch = preprocessor(batch)
            outputs = backbone(batch['inputs'])
            if isinstance(outputs, (tuple, list)):
                outputs = torch.cat(outputs, dim=1)
            features.append(outputs.unflatten(0, sequences).cpu() if sequences else outputs.cpu())
            samples = batch['data_samples']
            labels += [int(sample.gt_label) if labelled else -1 for sample in samples]
    finally:
        backbone.train(training)
    return torch.cat(features), torch.tensor(labels)


class CachedFeatures:
    """Features of the data sets of a run by its frozen network, extracted once and kept on disk.

    The network is built, and its checkpoint read, when they are first needed; then they serve all
    data sets. On several ranks each extracts its share of the images.

    The name of a file in the cache changes with whatever the features depend on: the content of
    the checkpoint, the backbone's config, ``blocks``, ``layer``, the head, the normalization, the
    config of the data set with its transforms, and its files by name, size, time of the last change
    and label. A file that cannot be read is made again. What is extracted when an image cannot be
    read, or on an interruption by Ctrl-C, is kept, and the next call extracts the rest. Several
    machines have to share the folder.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
        checkpoint (str, optional): Path or URL of its weights. None for the untrained network.
        cache_dir (str | Path): Folder of the cache.
        blocks (int): See :class:`Embedder`. Defaults to 1.
        batch_size (int): Images per batch of a rank. Defaults to 256.
        num_workers (int): Processes that read images. Defaults to 0.
        layer (int, optional): See :class:`Embedder`. Defaults to None.

    Example:
        >>> source = CachedFeatures(cfg, 'epoch_100.pth', 'work_dirs/features')
        >>> features, labels = source.load('val')
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        cache_dir: str | Path,
        blocks: int = 1,
        batch_size: int = 256,
        num_workers: int = 0,
        layer: int | None = None,
    ) -> None:
        self.cfg = cfg
        self.checkpoint = checkpoint
        self.cache_dir = Path(cache_dir)
        self.blocks = blocks
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.layer = layer

    @cached_property
    def network(self) -> Embedder:
        """The frozen network, in eval mode."""
        return Embedder(self.cfg, self.checkpoint, self.blocks, layer=self.layer)

    @cached_property
    def _weights(self) -> Any:
        """A running digest of the weights."""
        if self.checkpoint is not None:
            return hashlib.sha256(read_bytes(self.checkpoint))
        digest = hashlib.sha256()
        for values in self.network.state_dict().values():
            digest.update(values.cpu().numpy().tobytes())
        return digest

    def digest(self, split: str, preprocessor: nn.Module) -> Any:
        """A running digest of what features depend on, the images left out.

        Args:
            split (str): Key of ``cfg.evaluation``.
            preprocessor (nn.Module): See :func:`~ser_mm.evaluation.data.build_preprocessor`.

        Returns:
            Any: One of hashlib's, of the weights, the network, the data set and its transforms.
        """
        digest = self._weights.copy()
        model = self.cfg.model.get('algorithm') or self.cfg.model
        pixels = [preprocessor.to_rgb, *(b.flatten().tolist() for b in preprocessor.buffers())]
        evaluation = self.cfg.evaluation
        network = [model.get('backbone'), evaluation.get('prefix'), self.blocks]
        network += [] if self.layer is None else [self.layer]
        settings = [network, evaluation[split], pixels]
        digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        return digest

    def load(
        self,
        split: str,
        head: nn.Linear | None = None,
        batch_size: int | None = None,
        main_only: bool = False,
    ) -> tuple[Tensor, Tensor] | Any:
        """Features and labels of a data set, from the cache or else extracted.

        Args:
            split (str): Key of ``cfg.evaluation``.
            head (nn.Linear, optional): Give the classes that it finds, instead of features.
                Defaults to None.
            batch_size (int, optional): Images, or sequences of them, per batch of a rank. Defaults
                to None: that of all data sets.
            main_only (bool): Let the other ranks help to extract, and no more. Defaults to False.

        Returns:
            tuple: Features (N, C), or classes (N,), and labels (N,), on the CPU; the labels are -1
            where the data set has ``with_label=False``. Of sequences of T frames, (N, T, C) or
            (N, T). With ``main_only``, None on the other ranks.

        Raises:
            ValueError: If the config, the checkpoint and ``blocks`` do not go together, or if
                images cannot be read; it names them, and the others' features are kept.
        """
        batch_size = batch_size or self.batch_size
        preprocessor, loader = build_loader(self.cfg, split, batch_size, self.num_workers)
        rank, world_size = get_dist_info()
        rows: _Rows | None = None
        shares: dict[Path, _Rows] = {}
        found: list[Any] = [None, None]
        if rank == 0:
            print(f'{split}: features of {len(loader.dataset)} images', flush=True)
            entry = self._entry(split, loader.dataset, preprocessor, head)
            rows = read_kept(entry.file, entry.read)
            missing = None
            if rows is None:
                shares = entry.read_shares()
                known = {stamp for share in shares.values() for stamp in share.stamps}
                missing = np.flatnonzero([stamp not in known for stamp in entry.stamps])
            found = [entry, missing]
        broadcast_object_list(found)
        entry, missing = found
        if missing is not None:
            self.network.set_head(head)
            indices = missing[rank::world_size]
            batches: Iterable[ReadBatch] = read_batches(loader, indices, batch_size)
            if rank == 0:
                total = -(-len(indices) // batch_size)
                batches = tell_progress(batches, total, f'{split}: batch')
            labelled = dataset_of(self.cfg, split).get('with_label') is not False
            own, unreadable = self._extract(preprocessor, batches, entry, labelled)
            said = all_gather_object((own is not None, unreadable))
            unreadable = [x for _, some in said for x in some]
            if own and (rank or unreadable):
                entry.write_share(own)
            barrier()
            is_kept = shares or any(has for has, _ in said)
            refuse(split, unreadable, len(entry.stamps), entry.advice if is_kept else '')
            if rank == 0:
                if world_size > 1:
                    shares = entry.read_shares()
                rows = _Rows.join([*shares.values(), *([own] if own else [])], entry.stamps)
                rows.write(entry.file, entry.key)
                for file in shares:
                    file.unlink(missing_ok=True)
            barrier()
        if main_only and rank:
            return None
        rows = rows or entry.read(entry.file)
        return torch.from_numpy(rows.features), torch.from_numpy(rows.labels)

    def _extract(
        self,
        preprocessor: nn.Module,
        batches: Iterable[ReadBatch],
        entry: '_Entry',
        labelled: bool,
    ) -> tuple['_Rows | None', list[Unreadable]]:
        """Rows of images, and those that cannot be read; on an interruption rows are kept."""
        features, labels, places, unreadable = [], [], [], []

        def rows() -> _Rows | None:
            if not places:
                return None
            arrays = torch.cat(features).numpy(), torch.cat(labels).numpy()
            return _Rows(*arrays, entry.stamps[places])

        try:
            for batch in batches:
                unreadable += batch.unreadable
                if batch.content is not None:
                    content = [batch.content]
                    some = extract_features(self.network, preprocessor, content, labelled)
                    of_class = not some[0].is_floating_point()
                    check_finite([some[0].where(some[0] >= 0, torch.nan) if of_class else some[0]])
                    features.append(some[0])
                    labels.append(some[1])
                    places += batch.indices
                elif not places:
                    break  # none of the first can be read: it need not be the images
        except BaseException:
            found = rows()
            if found:
                with suppress(OSError):  # what interrupted is what is told
                    entry.write_share(found)
            raise
        return rows(), unreadable

    def _entry(
        self, split: str, dataset: Any, preprocessor: nn.Module, head: nn.Linear | None
    ) -> '_Entry':
        """Where the features of a data set are kept, by all that they depend on."""
        digest = self.digest(split, preprocessor)
        if head is not None:
            for values in head.parameters():
                digest.update(values.detach().cpu().numpy().tobytes())
        stamps = np.array(stamp_images(dataset), dtype='S32')
        kind = digest.hexdigest()[:20]
        digest.update(stamps.tobytes())
        prefix = self.cache_dir / split.replace('/', '-')
        return _Entry(prefix, kind, digest.hexdigest()[:20], stamps)


def load_features(
    cfg: Config,
    checkpoint: str | None,
    split: str,
    cache_dir: str | Path,
    blocks: int = 1,
    head: nn.Linear | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    main_only: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Features and labels of one data set; for several, use :class:`CachedFeatures`.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
        checkpoint (str, optional): Its weights. None for the untrained network.
        split (str): Key of ``cfg.evaluation``.
        cache_dir (str | Path): Folder of the cache.
        blocks (int): See :class:`Embedder`. Defaults to 1.
        head (nn.Linear, optional): Give the classes that it finds, instead of features. Defaults
            to None.
        batch_size (int): Images per batch of a rank. Defaults to 256.
        num_workers (int): Processes that read images. Defaults to 0.
        main_only (bool): Let the other ranks help to extract, and no more. Defaults to False.

    Returns:
        tuple: See :meth:`CachedFeatures.load`.

    Raises:
        ValueError: If the config, the checkpoint and ``blocks`` do not go together.
    """
    source = CachedFeatures(cfg, checkpoint, cache_dir, blocks, batch_size, num_workers)
    return source.load(split, head, main_only=main_only)


def stamp_images(dataset: Any, indices: Iterable[int] | None = None) -> list[str]:
    """What tells whether the images of a data set are the same as before.

    Args:
        dataset (Any): A data set of MMEngine's kind, with ``get_data_info``.
        indices (Iterable[int], optional): Places of the images. Defaults to None: all.

    Returns:
        list[str]: For each image a digest, of 32 characters, see :func:`stamp_file`, of its file
        and label. Of one without a file, as of CIFAR, of its pixels and label.
    """
    stamps = []
    for i in range(len(dataset)) if indices is None else indices:
        info = dataset.get_data_info(i)
        file = info.get('img_path')
        if file is None and isinstance(info.get('img'), np.ndarray):
            file = hashlib.sha256(np.ascontiguousarray(info['img']).data).hexdigest()
        stamps.append(stamp_file(file, info.get('gt_label')))
    return stamps


def stamp_file(file: Any, about: Any = None) -> str:
    """What tells whether a file is the same as before.

    Args:
        file (Any): Its path, or whatever takes its place.
        about (Any): What else is to be the same. Defaults to None.

    Returns:
        str: A digest, of 32 characters, of the path, the size and the time of the last change, the
        latter two of files in this file system, and of ``about``.
    """
    status = None
    with suppress(OSError, TypeError):  # not in this file system, or not a file
        found = os.stat(file_of(os.fspath(file)))
        status = found.st_size, found.st_mtime_ns
    text = f'{file} {status} {about}'
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:32]


class _Rows(NamedTuple):
    """Features of images, their labels, and the images' stamps, (N,)."""

    features: np.ndarray
    labels: np.ndarray
    stamps: np.ndarray

    def write(self, file: Path, about: str) -> None:
        """Write them, with what tells the kind of features."""
        with replacing(file) as part, part.open('wb') as opened:
            np.savez(opened, about=np.array(about), **self._asdict())

    @classmethod
    def read(cls, file: Path, about: str, count: int | None = None) -> '_Rows':
        """Read what :meth:`write` wrote; a ValueError or another if a file holds anything else."""
        with np.load(file) as arrays:
            rows = cls(*(arrays[name] for name in cls._fields))
            found = str(arrays['about'])
        count = len(rows.features) if count is None else count
        if found != about or [len(array) for array in rows] != [count] * 3:
            raise ValueError('it holds features of other images')
        return rows

    @classmethod
    def join(cls, parts: 'Sequence[_Rows]', stamps: np.ndarray) -> '_Rows':
        """The rows of images, in their order, out of parts that have them in any order."""
        whole = cls(*map(np.concatenate, zip(*parts, strict=True)))
        if np.array_equal(whole.stamps, stamps):
            return whole
        places = {stamp: i for i, stamp in enumerate(whole.stamps)}
        order = [places[stamp] for stamp in stamps]
        return cls(*(array[order] for array in whole))


class _Entry(NamedTuple):
    """The features of a data set in the cache."""

    prefix: Path
    kind: str
    """What features depend on, the images left out."""
    key: str
    """What features depend on."""
    stamps: np.ndarray
    """Of the images, (N,)."""

    @property
    def file(self) -> Path:
        return Path(f'{self.prefix}-{self.key}.npz')

    @property
    def advice(self) -> str:
        return f' The others are kept in {self.file.parent}; the same command extracts the rest.'

    def read(self, file: Path) -> _Rows:
        """Read all features."""
        return _Rows.read(file, self.key, len(self.stamps))

    def write_share(self, rows: _Rows) -> None:
        """Keep some of the features, until there are all."""
        rows.write(Path(f'{self.prefix}-{self.kind}.share-{uuid.uuid4().hex}.npz'), self.kind)

    def read_shares(self) -> dict[Path, _Rows]:
        """Features that calls have kept, by file; a damaged file is removed."""
        shares = {}
        pattern = f'{glob.escape(self.prefix.name)}-{self.kind}.share-*.npz'
        for file in sorted(self.file.parent.glob(pattern)):
            rows = read_kept(file, lambda file: _Rows.read(file, self.kind))
            if rows is None:
                file.unlink(missing_ok=True)
            else:
                shares[file] = rows
        return shares
