"""Segmentation by single tokens of a frozen map: a linear probe, and the nearest tokens."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from ser_mm.datasets.image_source import SUFFIXES
from ser_mm.evaluation.positions import pixels_as_map
from ser_mm.progress import tell_progress

IGNORED = 255
"""Label of pixels that do not count."""
_TOKENS = 20_000
"""Training tokens that are kept, at most."""
_NEIGHBOURS, _TEMPERATURE = 30, 0.02


def find_pairs(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """Images with their masks.

    Args:
        root (str | Path): Folder with ``SPLIT/images/NAME.*`` and ``SPLIT/masks/NAME.png``, whose
            pixels are the classes, from 0, and 255 where there is none.
        split (str): 'train' or 'val'.

    Returns:
        list[tuple[Path, Path]]: In the order of the names.

    Raises:
        FileNotFoundError: If there is no image, or one has no mask.
    """
    folder = Path(root).expanduser() / split
    images = sorted(x for x in folder.glob('images/*') if x.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f'{folder / "images"} has no image; put images there, and masks.')
    pairs = [(x, folder / 'masks' / f'{x.stem}.png') for x in images]
    missing = [mask for _, mask in pairs if not mask.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{missing[0]} is missing, and {len(missing) - 1} more masks; write a PNG with the '
            f'class of each pixel, {IGNORED} for none.'
        )
    return pairs


def read_pairs(
    pairs: Sequence[tuple[Path, Path]],
    size: tuple[int, int],
    preprocessor: nn.Module,
    batch_size: int = 64,
    load: Callable[[dict], dict | None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and masks, scaled to one size.

    Args:
        pairs (Sequence[tuple[Path, Path]]): What :func:`find_pairs` returned.
        size (tuple[int, int]): Height and width.
        preprocessor (nn.Module): See :func:`~ser_mm.evaluation.data.build_preprocessor`.
        batch_size (int): Images per batch. Defaults to 64.
        load (Callable, optional): Transform that loads the images of a config. Defaults to None:
            they are taken as RGB of 8 bits, as configs of data sets that hold pixels do.

    Yields:
        tuple: Images (N, C, H, W), as the network takes them, and classes (N, H, W) on the CPU.

    Raises:
        ValueError: If an image cannot be read, or a mask has another size than its image, or is no
            map of classes.
    """
    for start in range(0, len(pairs), batch_size):
        images, masks = [], []
        for file, mask_file in pairs[start : start + batch_size]:
            image = _load(file, load)
            with Image.open(mask_file) as mask:
                if mask.mode not in ('L', 'P') or mask.size != image.shape[1::-1]:
                    raise ValueError(
                        f'{mask_file} is {mask.size[0]} x {mask.size[1]} of mode {mask.mode}, and '
                        f'its image {image.shape[1]} x {image.shape[0]}; write the class of each '
                        'pixel as 8 bits, grey or with a palette.'
                    )
                images.append(_resize(image, size))
                mask = mask.resize(size[::-1], Image.Resampling.NEAREST)
                masks.append(torch.from_numpy(np.array(mask)).long())
        inputs = [x.permute(2, 0, 1) for x in images]
        yield preprocessor(dict(inputs=inputs))['inputs'], torch.stack(masks)


def _load(file: Path, load: Callable[[dict], dict | None] | None) -> np.ndarray:
    """An image (H, W, C), in the order of channels that the transforms of a config give."""
    if load is None:
        with Image.open(file) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert('RGB'))
    try:
        loaded, why = load(dict(img_path=str(file))), ''
    except Exception as error:  # of many types, by format and decoder
        loaded, why = None, f' ({type(error).__name__}: {(str(error).splitlines() or [""])[0]})'
    if loaded is None:
        raise ValueError(f'{file} cannot be read as an image{why}; replace or remove it.')
    image = loaded['img']
    return image if image.ndim == 3 else image[..., None]


def _resize(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Bicubic, with a filter where it shrinks; floats, and other channels than three, by torch."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        small = Image.fromarray(np.ascontiguousarray(image)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(small))
    batch = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    return F.interpolate(batch, size, mode='bicubic', antialias=True)[0].permute(1, 2, 0)


def patch_shares(masks: Tensor, grid: Sequence[int], classes: int) -> Tensor:
    """Shares of the classes in the patch of each token.

    Args:
        masks (Tensor): Classes, (N, H, W); sides are multiples of the grid's.
        grid (Sequence[int]): Rows and columns of tokens.
        classes (int): K.

    Returns:
        Tensor: (N, K, h, w), all 0 where no pixel of a patch counts.
    """
    counts = F.one_hot(masks.clamp(max=classes), classes + 1)[..., :classes].permute(0, 3, 1, 2)
    size = masks.shape[1] // grid[0], masks.shape[2] // grid[1]
    shares = F.avg_pool2d(counts.double(), size)
    return shares / shares.sum(1, keepdim=True).clamp(min=1e-12)


def mean_iou(counts: Tensor) -> float:
    """Mean over classes of intersection over union.

    Args:
        counts (Tensor): Pixels by true and found class, (K, K). Classes that are neither true nor
            found anywhere do not count.
    """
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    there = union > 0
    return float((hits[there] / union[there]).mean()) if there.any() else math.nan


class _Kept:
    """``_TOKENS`` of the rows that are added, drawn evenly, and the same in maps of one grid.

    Not those at equal distances: where the distance is a multiple of the grid's width, they all
    come from one column.
    """

    def __init__(self) -> None:
        self.rows: tuple[Tensor, ...] = ()
        self.lots = torch.empty(0, dtype=torch.float64)
        self.seen, self.random = 0, torch.Generator().manual_seed(0)

    def add(self, *rows: Tensor) -> None:
        self.seen += len(rows[0])
        lots = torch.rand(len(rows[0]), generator=self.random, dtype=torch.float64)
        self.lots = torch.cat([self.lots, lots])
        self.rows = tuple(map(torch.cat, zip(self.rows, rows, strict=True))) if self.rows else rows
        if len(self.lots) > _TOKENS:  # the lowest lots
            kept = self.lots.topk(_TOKENS, largest=False).indices.sort().values
            self.lots, self.rows = self.lots[kept], tuple(x[kept] for x in self.rows)


class _Bank:
    """Tokens of one map and what is in their patches; and what these say of other tokens."""

    def __init__(self, tokens: Tensor, shares: Tensor) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits

        self.keys, self.shares = F.normalize(tokens, dim=1), shares
        labels = shares.argmax(1)
        self.only = int(labels[0]) if (labels == labels[0]).all() else None
        if self.only is None:
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            with threadpool_limits(1):
                self.probe = probe.fit(tokens.numpy(), labels.numpy())

    def linear(self, tokens: Tensor) -> Tensor:
        """Log probabilities of the classes, (N, K)."""
        scores = torch.full((len(tokens), self.shares.shape[1]), -1e3, dtype=torch.float64)
        if self.only is not None:
            scores[:, self.only] = 0
            return scores
        found = torch.from_numpy(self.probe.predict_log_proba(tokens.numpy())).double()
        scores[:, torch.from_numpy(self.probe.classes_)] = found.clamp(min=-1e3)
        return scores

    def nearest(self, tokens: Tensor) -> Tensor:
        """Shares of the classes in the patches of the nearest tokens, weighted, (N, K)."""
        k = min(_NEIGHBOURS, len(self.keys))
        parts = []
        for queries in F.normalize(tokens, dim=1).split(max(1, 2**25 // len(self.keys))):
            similarity, places = (queries @ self.keys.T).topk(k, dim=1)
            weights = (similarity.double() / _TEMPERATURE).softmax(dim=1)
            parts.append((weights[..., None] * self.shares[places]).sum(1))
        return torch.cat(parts)


@torch.no_grad()
def segmentation_by_layer(
    token_maps: Callable[[Tensor], Sequence[Tensor]],
    train: Iterable[tuple[Tensor, Tensor]],
    val: Iterable[tuple[Tensor, Tensor]],
    classes: int,
) -> dict[str, Any]:
    """Segment images by single tokens of frozen maps.

    - ``linear``: a logistic regression of standardized tokens on the class that most of a token's
      patch has; its log probabilities, scaled up bilinearly, decide on each pixel.
    - ``nearest``: the 30 training tokens that are nearest by cosine vote with the shares of the
      classes in their patches, weighted by a softmax of temperature 0.02 (in-context retrieval,
      Balazevic et al., NeurIPS 2023, in its simplest form). Scaled up likewise.

    Of the training tokens with a class at most 20,000, drawn evenly, are used.

    Args:
        token_maps (Callable): Maps images (N, 3, H, W) to token maps (N, C, h, w), one per layer,
            in eval mode, see :func:`~ser_mm.evaluation.token_maps_of`.
        train (Iterable): Batches of images and classes, see :func:`read_pairs`.
        val (Iterable): Others, to score on.
        classes (int): K; labels of K and more do not count.

    Returns:
        dict[str, Any]: mIoU (see :func:`mean_iou`): of ``linear`` and ``nearest`` by layer;
        ``linear_pixels`` and ``nearest_pixels``, the same of the pixels of each token's patch, None
        where there are none (see :func:`~ser_mm.evaluation.positions.pixels_as_map`); ``floor``,
        the most frequent class of the training tokens everywhere; and ``ceiling``, the true
        shares of the patches of the first map, scaled up like what is found.

    Raises:
        ValueError: If no token of a training image, or no validation image, has a class.
    """
    depth = 0

    def maps_of(images: Tensor) -> list[Tensor]:
        nonlocal depth
        maps = [x.float().cpu() for x in token_maps(images)]
        depth = len(maps)
        pixels = pixels_as_map(images, maps[0].shape[-2:])
        return maps if pixels is None else [*maps, pixels.float().cpu()]

    kept: list[_Kept] = []
    for images, masks in train:
        maps = maps_of(images)
        kept = kept or [_Kept() for _ in maps]
        for own, f in zip(kept, maps, strict=True):
            shares = _rows(patch_shares(masks, f.shape[-2:], classes))
            counted = shares.sum(1) > 0
            own.add(_rows(f)[counted], shares[counted])
    if not kept or not kept[0].seen:
        raise ValueError(f'train: no pixel has a class from 0 to {classes - 1}; look at the masks.')
    fitted = tell_progress(kept, len(kept), 'segmentation: probe of layer')
    banks = [_Bank(*own.rows) for own in fitted]
    frequent = int(kept[0].rows[1].sum(0).argmax())
    counts: dict[str, list[Tensor]] = {
        name: [torch.zeros(classes, classes, dtype=torch.int64) for _ in banks]
        for name in ('linear', 'nearest')
    }
    bounds = {
        name: torch.zeros(classes, classes, dtype=torch.int64) for name in ('floor', 'ceiling')
    }
    for images, masks in val:
        for i, f in enumerate(maps_of(images)):
            for name, some in counts.items():
                scores = getattr(banks[i], name)(_rows(f))
                scores = scores.view(len(f), *f.shape[-2:], classes).permute(0, 3, 1, 2)
                found = F.interpolate(scores, masks.shape[-2:], mode='bilinear').argmax(1)
                some[i] += _count(masks, found, classes)
            if i == 0:
                true = patch_shares(masks, f.shape[-2:], classes)
                best = F.interpolate(true, masks.shape[-2:], mode='bilinear').argmax(1)
                bounds['ceiling'] += _count(masks, best, classes)
                bounds['floor'] += _count(masks, torch.full_like(masks, frequent), classes)
    if not bounds['floor'].sum():
        raise ValueError(f'val: no pixel has a class from 0 to {classes - 1}; look at the masks.')
    found_by: dict[str, Any] = {name: mean_iou(x) for name, x in bounds.items()}
    for name, some in counts.items():
        values = [mean_iou(x) for x in some]
        found_by[name] = values[:depth]
        found_by[f'{name}_pixels'] = values[depth] if values[depth:] else None
    return found_by


def _rows(maps: Tensor) -> Tensor:
    """Tokens, (N h w, C), of maps (N, C, h, w)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def _count(true: Tensor, found: Tensor, classes: int) -> Tensor:
    counted = true < classes
    pairs = true[counted] * classes + found[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def count_classes(pairs: Sequence[tuple[Path, Path]]) -> int:
    """One more than the largest class in masks, those of 255 left out.

    Args:
        pairs (Sequence[tuple[Path, Path]]): What :func:`find_pairs` returned.
    """
    largest = 0
    for _, file in pairs:
        with Image.open(file) as mask:
            values = np.unique(np.asarray(mask))
        largest = max([largest, *values[values != IGNORED].tolist()])
    return largest + 1
