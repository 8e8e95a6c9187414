"""Features of a data set by a frozen network, extracted once on all ranks and kept on disk."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import mmengine.fileio
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

from ser_mm.engine.logs import tell_progress
from ser_mm.evaluation.backbone import as_config, build_backbone
from ser_mm.evaluation.data import build_loader, build_preprocessor, dataset_of


class Embedder(nn.Module):
    """A backbone and what turns its outputs into one vector per image.

    With ``blocks=1`` the vector is the last output: a [CLS] token, or a map averaged over its
    places. With more, the [CLS] tokens of the last blocks of a ViT side by side, each through the
    final norm, which is DINO's protocol for the linear probe.

    Args:
        cfg (Config | str | Path): Config of a run, its path, or the name of a shipped one, see
            :func:`~ser_mm.evaluation.build_backbone`.
        checkpoint (str, optional): Its weights. Defaults to None: untrained.
        blocks (int): Last blocks to take. Defaults to 1.
        head (nn.Linear, optional): Give the class that a copy of it finds in the vector, instead
            of the vector. Defaults to None.

    Raises:
        ValueError: If ``blocks`` is not in the network, or an output is no vector and no map.

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
    ) -> None:
        super().__init__()
        cfg = as_config(cfg)
        model = cfg.model.get('algorithm') or cfg.model
        kind = model.get('backbone', {}).get('type')
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if blocks < 1 or (blocks > 1 and not (kind and issubclass(kind, VisionTransformer))):
            raise ValueError(
                f'blocks={blocks}: the last blocks can be joined for a ViT only, and this is '
                f'{kind and kind.__name__}; use blocks=1.'
            )
        options = dict(out_type='cls_token') if blocks > 1 else {}
        self.backbone = build_backbone(cfg, checkpoint, **options)
        if blocks > 1:
            depth = self.backbone.num_layers
            with_cls = depth - getattr(self.backbone, 'cls_layer', 0)
            if blocks > with_cls:
                raise ValueError(
                    f'blocks={blocks}: [CLS] is in the last {with_cls} blocks of the network; use '
                    'that many at most.'
                )
            self.backbone.out_indices = list(range(depth - blocks, depth))
        self.blocks = blocks
        self.set_head(head)
        self._cfg = cfg

    @torch.no_grad()
    def embed(
        self, images: str | Path | Sequence[str | Path | np.ndarray], batch_size: int = 64
    ) -> Tensor:
        """Features of images, prepared as the config's ``evaluation.val`` prepares them.

        Args:
            images (str | Path | Sequence[str | Path | np.ndarray]): A file, or files and arrays
                (H, W, 3), uint8, BGR.
            batch_size (int): Images at one time. Defaults to 64.

        Returns:
            Tensor: Shape (N, C), or classes (N,) with a head; on the CPU.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If there is no image, or the config says nothing of transforms or
                normalization.
        """
        if isinstance(images, str | Path):
            images = [images]
        if not len(images):
            raise ValueError('Embedder.embed: there is no image; give files or arrays.')
        load, *rest = [
            TRANSFORMS.build(x) for x in deepcopy(dataset_of(self._cfg, 'val')['pipeline'])
        ]
        pipeline, preprocessor = Compose(rest), build_preprocessor(self._cfg)

        def prepare(image: str | Path | np.ndarray) -> dict:
            if isinstance(image, np.ndarray):
                size = image.shape[:2]
                return pipeline(dict(img=image, img_shape=size, ori_shape=size))
            return pipeline(load(dict(img_path=str(image))))

        features = []
        for start in range(0, len(images), batch_size):
            batch = default_collate([prepare(x) for x in images[start : start + batch_size]])
            features.append(self(preprocessor(batch)['inputs']).cpu())
        return torch.cat(features)

    def set_head(self, head: nn.Linear | None) -> None:
        """Give the class that a copy of ``head`` finds from now on, or the vector if it is None."""
        self.head = head and deepcopy(head).to(get_device())

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) as vectors (N, C), or classify them (N,)."""
        outputs = self.backbone(images)
        outputs = outputs[-self.blocks :] if isinstance(outputs, (tuple, list)) else [outputs]
        if self.blocks > 1 and self.backbone.final_norm:
            outputs = [*(self.backbone.ln1(x) for x in outputs[:-1]), outputs[-1]]
        if isinstance(outputs[-1], (tuple, list)):  # [CLS] and distillation token, map and [CLS]
            outputs = outputs[-1]
        vectors = [x.mean(dim=(2, 3)) if x.ndim == 4 else x for x in outputs]
        if not hasattr(self.backbone, 'out_type'):  # maps laid flat, (N, C, L)
            vectors = [x.mean(dim=2) if x.ndim == 3 else x for x in vectors]
        odd = next((x for x in vectors if x.ndim != 2), None)
        if odd is not None:
            raise ValueError(
                f'The backbone gives {tuple(odd.shape)} for {len(images)} images, not a '
                "vector or a map for each; set --cfg-options model.backbone.out_type='cls_token' "
                '(model.algorithm.backbone... with SERAlgorithm).'
            )
        vectors = torch.cat(vectors, dim=1)
        return self.head(vectors).argmax(dim=1) if self.head else vectors


@torch.no_grad()
def extract_features(
    backbone: nn.Module, preprocessor: Callable[[dict], dict], batches: Iterable[dict]
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
            labels += [int(sample.gt_label) for sample in batch['data_samples']]
    finally:
        backbone.train(training)
    return torch.cat(features), torch.tensor(labels)


class CachedFeatures:
    """Features of the data sets of a run by its frozen network, extracted once and kept on disk.

    The network is built, and its checkpoint read, when they are first needed; then they serve all
    data sets. On several ranks each extracts its share of the images.

    The name of a file in the cache changes with whatever the features depend on: the content of
    the checkpoint, the backbone's config, ``blocks``, the head, the normalization, the config of
    the data set with its transforms, and its files by name, size and label. The file gets its
    name when it is complete. Several machines have to share the folder.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
        checkpoint (str, optional): Path or URL of its weights. None for the untrained network.
        cache_dir (str | Path): Folder of the cache.
        blocks (int): See :class:`Embedder`. Defaults to 1.
        batch_size (int): Images per batch of a rank. Defaults to 256.
        num_workers (int): Processes that read images. Defaults to 0.

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
    ) -> None:
        self.cfg = cfg
        self.checkpoint = checkpoint
        self.cache_dir = Path(cache_dir)
        self.blocks = blocks
        self.batch_size = batch_size
        self.num_workers = num_workers

    @cached_property
    def network(self) -> Embedder:
        """The frozen network, in eval mode."""
        return Embedder(self.cfg, self.checkpoint, self.blocks)

    @cached_property
    def _weights(self) -> Any:
        """A running digest of the weights."""
        if self.checkpoint is not None:
            return hashlib.sha256(mmengine.fileio.get(self.checkpoint))
        digest = hashlib.sha256()
        for values in self.network.state_dict().values():
            digest.update(values.cpu().numpy().tobytes())
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
            tuple: Features (N, C), or classes (N,), and labels (N,), on the CPU. Of sequences of T
            frames, (N, T, C) or (N, T). With ``main_only``, None on the other ranks.

        Raises:
            ValueError: If the config, the checkpoint and ``blocks`` do not go together.
        """
        preprocessor, loader = build_loader(
            self.cfg, split, batch_size or self.batch_size, self.num_workers
        )
        rank, world_size = get_dist_info()
        found: list[Any] = [None, None, None]
        if rank == 0:
            print(f'{split}: features of {len(loader.dataset)} images', flush=True)
            key = self._key(split, loader.dataset, preprocessor, head)
            path = self.cache_dir / f'{split.replace("/", "-")}-{key}.npz'
            # Another process may be after the same features: each has part files of its own.
            found = [path, path.exists(), uuid.uuid4().hex]
        broadcast_object_list(found)
        path, cached, run = found
        if not cached:
            self.network.set_head(head)
            batches = loader
            if rank == 0:
                batches = tell_progress(loader, len(loader), f'{split}: batch')
            parts = [path.with_suffix(f'.{run}.part{i}.npz') for i in range(world_size)]
            _save(parts[rank], *extract_features(self.network, preprocessor, batches))
            barrier()
            if rank == 0:
                _join(parts, path)
            barrier()
        if main_only and rank:
            return None
        with np.load(path) as arrays:
            return torch.from_numpy(arrays['features']), torch.from_numpy(arrays['labels'])

    def _key(
        self,
        split: str,
        dataset: torch.utils.data.Dataset,
        preprocessor: nn.Module,
        head: nn.Linear | None,
    ) -> str:
        """A name for all that features depend on."""
        digest = self._weights.copy()
        model = self.cfg.model.get('algorithm') or self.cfg.model
        pixels = [preprocessor.to_rgb, *(b.flatten().tolist() for b in preprocessor.buffers())]
        settings = [model.get('backbone'), self.cfg.evaluation[split], pixels, self.blocks]
        digest.update(json.dumps(settings, sort_keys=True, default=repr).encode())
        if head is not None:
            for values in head.parameters():
                digest.update(values.detach().cpu().numpy().tobytes())
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            file, size = info.get('img_path'), None
            with suppress(OSError, TypeError):  # not in this file system, or not a file
                size = os.stat(file).st_size
            digest.update(f'{file} {size} {info.get("gt_label")}\n'.encode())
        return digest.hexdigest()[:20]


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


def _save(path: Path, features: Tensor, labels: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('wb') as file:
        np.savez(file, features=features.numpy(), labels=labels.numpy())


def _join(parts: list[Path], path: Path) -> None:
    """Put what the ranks wrote, each every ``len(parts)``-th image, into one file."""
    if len(parts) > 1:
        arrays = [dict(np.load(part)) for part in parts]
        whole = {}
        for name in ('features', 'labels'):
            shares = [array[name] for array in arrays]
            whole[name] = np.empty((sum(map(len, shares)), *shares[0].shape[1:]), shares[0].dtype)
            for rank, share in enumerate(shares):
                whole[name][rank :: len(parts)] = share
        _save(parts[0], **{name: torch.from_numpy(array) for name, array in whole.items()})
    parts[0].replace(path)
    for part in parts[1:]:
        part.unlink()
