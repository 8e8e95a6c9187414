"""What token maps are good for, measure by measure, of one network."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_dist_info,
    get_world_size,
    is_main_process,
)
from mmengine.runner import set_random_seed
from mmpretrain.datasets import CIFAR10, MNIST
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch import Tensor

from ser_mm.evaluation.angles import accuracy_by_angle
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.correspondence import correspondence_by_layer
from ser_mm.evaluation.data import (
    begins_by_loading,
    build_loader,
    build_preprocessor,
    dataset_of,
    evaluation_pipeline,
    spaced_images,
    spaced_indices,
    spaced_labelled,
)
from ser_mm.evaluation.features import CachedFeatures, stamp_file, stamp_images
from ser_mm.evaluation.metrics import check_finite
from ser_mm.evaluation.positions import pixels_as_map, position_by_layer
from ser_mm.evaluation.results import make_table
from ser_mm.evaluation.segmentation import (
    count_classes,
    find_pairs,
    read_pairs,
    segmentation_by_layer,
)
from ser_mm.evaluation.warping import draw_warps, rotations
from ser_mm.files import read_kept, write_text
from ser_mm.progress import tell_progress

MEASURES = ('correspondence', 'angle', 'position', 'segmentation')
"""Measures of :func:`measure_dense`."""

_SPLITS: dict[str, list[str]] = dict(
    correspondence=['val'], angle=['train', 'val'], position=['train', 'val'], segmentation=[]
)
"""Of ``evaluation``, those that each measure looks at."""

AFFINE = 'affine'
"""Name of the warps that are drawn, beside the angles."""


def check_measures(measures: Sequence[str] | None, masks: str | Path | None) -> list[str]:
    """Check names of measures.

    Args:
        measures (Sequence[str], optional): Of ``MEASURES``. None for all, 'segmentation' only where
            there are masks.
        masks (str | Path, optional): See :func:`measure_dense`.

    Returns:
        list[str]: The measures.

    Raises:
        ValueError: If one is not in ``MEASURES``, none is given, or 'segmentation' has no masks.
    """
    if measures is None:
        return [x for x in MEASURES if x != 'segmentation' or masks is not None]
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown or not measures:
        raise ValueError(f'measures={list(measures)}: choose one or more of {", ".join(MEASURES)}.')
    if 'segmentation' in measures and masks is None:
        raise ValueError(
            "measures: 'segmentation' needs masks, a folder of images and their masks."
        )
    return list(measures)


def select_maps(
    token_maps: Callable[[Tensor], Sequence[Tensor]], layers: Sequence[int] | None = None
) -> Callable[[Tensor], list[Tensor]]:
    """Some of the token maps of a network, checked.

    Args:
        token_maps (Callable): See :func:`~ser_mm.evaluation.token_maps_of`.
        layers (Sequence[int], optional): Blocks of a ViT, or stages of a ResNet, counted from 1.
            Defaults to None: all.

    Returns:
        Callable: Maps images (N, 3, H, W) to token maps (N, C, h, w), one per block. It raises a
        ValueError if the network has not so many, or a block gives no map.
    """

    def select(images: Tensor) -> list[Tensor]:
        maps = list(token_maps(images))
        missing = [i for i in layers or () if not 1 <= i <= len(maps)]
        if missing:
            raise ValueError(
                f'layers={list(layers or ())}: the network has {len(maps)}, counted from 1; leave '
                f'out {missing[0]}.'
            )
        maps = [maps[i - 1] for i in layers] if layers else maps
        odd = next((tuple(f.shape) for f in maps if f.ndim != 4), None)
        if odd:
            raise ValueError(
                f'a block gives {odd}, not a token map (N, C, h, w); use a network with maps, '
                "out_type='featmap' where it has an out_type."
            )
        check_finite(maps)
        return maps

    return select


def measure_dense(
    cfg: Config,
    checkpoint: str | None,
    measures: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    images: int = 200,
    train_images: int = 5000,
    step: float = 15,
    affine: int = 8,
    within: float = 1.0,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    masks: str | Path | None = None,
    keep: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the token maps of a frozen network.

    Of several ranks each takes some of the measures, and all return all of them. None depends on
    the others, nor on the number of ranks.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
        checkpoint (str, optional): Its weights. None for the untrained network.
        measures (Sequence[str], optional): Of ``MEASURES``. Defaults to None: all, 'segmentation'
            where ``masks`` is given.
        layers (Sequence[int], optional): Blocks of a ViT or stages of a ResNet, counted from 1.
            Defaults to None: all. 'angle' looks at the final representation.
        images (int): Validation images, at most, at equal distances. Defaults to 200.
        train_images (int): Training images, likewise, of 'angle' and 'position'. Defaults to 5000.
        step (float): Degrees between two angles. Defaults to 15.
        affine (int): Of 'correspondence', warps that are drawn, see
            :func:`~ser_mm.evaluation.warping.draw_warps`. Defaults to 8.
        within (float): Of 'correspondence', distance in tokens up to which a match is right.
            Defaults to 1.0.
        batch_size (int): Images per step. Defaults to 64.
        num_workers (int): Processes that read images. Defaults to 0.
        seed (int): Of the untrained network and of what is drawn. Defaults to 0.
        masks (str | Path, optional): Of 'segmentation', see
            :func:`~ser_mm.evaluation.segmentation.find_pairs`. Defaults to None.
        keep (str | Path, optional): Start of the names of the files that keep what is measured,
            ``KEEP.angle.kept``, ...: a measure is taken from there if nothing that it depends on
            has changed, see :class:`~ser_mm.evaluation.features.CachedFeatures`, and a file that
            cannot be read is made again. Several machines have to share the folder. Defaults to
            None: nothing is kept.

    Returns:
        dict[str, Any]: ``layers``, the numbers of the blocks, none for 'angle' alone, and by
        measure:

        - ``correspondence``: see
          :func:`~ser_mm.evaluation.correspondence.correspondence_by_layer`, by angle and for
          'affine', all drawn warps together.
        - ``angle``: see :func:`~ser_mm.evaluation.angles.accuracy_by_angle`.
        - ``position``: ``layers``, see :func:`~ser_mm.evaluation.positions.position_by_layer`, and
          ``pixels``, the same of the pixels of the patches of the first block; None where these
          are no squares of up to 32 pixels.
        - ``segmentation``: ``classes``, their number, and what
          :func:`~ser_mm.evaluation.segmentation.segmentation_by_layer` returned.

    Raises:
        FileNotFoundError: If there are no images to segment, or a mask is missing.
        ValueError: If a measure or a block is unknown, an image cannot be read, the network gives
            no maps, or several processes are to measure on CIFAR or MNIST.
    """
    measures = check_measures(measures, masks)
    if get_world_size() > 1:
        check_waits_for_none(cfg, {x for name in measures for x in _SPLITS[name]} | {'val'})
    pairs = {x: find_pairs(masks, x) for x in ('train', 'val')} if masks is not None else {}
    set_random_seed(seed)
    source = CachedFeatures(cfg, checkpoint, '', batch_size=batch_size, num_workers=num_workers)
    run = _Run(source, pairs, layers, images, train_images, step, affine, within, seed)
    files = {} if keep is None else {x: Path(f'{keep}.{x}.kept') for x in measures}
    if set(measures) - {'angle'}:  # what cannot be measured is told before what takes long
        run.count_layers()
    shared: list[Any] = [None]
    if is_main_process():
        splits = {x for name in files for x in _SPLITS[name]}
        datasets = {x: build_loader(cfg, x)[1].dataset for x in splits}
        keys = {name: run.key(name, datasets) for name in files}
        del datasets  # which may be large
        there = {name: read_kept(files[name], partial(_read, keys[name])) for name in files}
        shared = [(keys, {name: x for name, x in there.items() if x is not None})]
        for name in shared[0][1]:
            print(f'{name}: taken from {files[name]}', flush=True)
    broadcast_object_list(shared)
    keys, kept = shared[0]
    rank, world_size = get_dist_info()
    own = {}
    for name in [x for x in MEASURES if x in measures and x not in kept][rank::world_size]:
        print(name, flush=True)
        own[name] = getattr(run, name)()
        if name in files:
            write_text(files[name], json.dumps(dict(key=keys[name], found=own[name])))
    for some in all_gather_object(own):
        kept |= some
    return dict(layers=run.numbers, **{x: kept[x] for x in MEASURES if x in measures})


def check_waits_for_none(cfg: Config, splits: Iterable[str]) -> None:
    """Refuse data sets that all processes have to build at once, as each has its own measures.

    Args:
        cfg (Config): With ``evaluation``.
        splits (Iterable[str]): Of it, those that are looked at.

    Raises:
        ValueError: If one is CIFAR or MNIST of MMPretrain.
    """
    for split in splits:
        kind = dataset_of(cfg, split)['type']
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, CIFAR10 | MNIST):
            raise ValueError(
                f'evaluation.{split}.type={kind.__name__} is built by all processes at once, and '
                'these have measures of their own; run the command as one process.'
            )


def _read(key: str, file: Path) -> Any:
    """What was measured before; None if it was something else."""
    content = json.loads(file.read_text())
    return content['found'] if content['key'] == key else None


class _Run:
    """The measures of a network, each a method, and what each depends on."""

    def __init__(
        self,
        source: CachedFeatures,
        pairs: dict[str, list[tuple[Path, Path]]],
        layers: Sequence[int] | None,
        images: int,
        train_images: int,
        step: float,
        affine: int,
        within: float,
        seed: int,
    ) -> None:
        self.network = source.network  # drawn at once, if it is untrained
        self.source, self.cfg, self.pairs, self.layers = source, source.cfg, pairs, layers
        self.step, self.affine, self.within, self.seed = step, affine, within, seed
        self.images = dict(train=train_images, val=images)
        self.reading = dict(batch_size=source.batch_size, num_workers=source.num_workers)
        self.numbers: list[int] = []
        self.size: tuple[int, int] = (0, 0)

    def count_layers(self) -> None:
        """Look at one image: which layers there are, and how large it is."""
        image = next(spaced_images(self.cfg, 'val', 1))
        with self._maps() as token_maps:
            maps = token_maps(image)
        self.numbers = list(self.layers or range(1, len(maps) + 1))
        self.size = image.shape[-2:]

    def key(self, measure: str, datasets: dict[str, Any]) -> str:
        """A digest of all that a measure depends on, with the data sets that it looks at."""
        settings = dict(
            correspondence=[self.step, self.affine, self.within, self.seed],
            angle=[self.step],
            segmentation=['tokens drawn evenly', 'loaded by the config'],
        )
        about = [measure, torch.__version__, settings.get(measure)]
        about.append([] if measure == 'angle' else self.numbers)
        digest = hashlib.sha256(json.dumps(about, default=float).encode())
        preprocessor = build_preprocessor(self.cfg)
        for split in _SPLITS[measure] or ['val']:
            digest.update(self.source.digest(split, preprocessor).digest())
        for split in _SPLITS[measure]:
            chosen = spaced_indices(len(datasets[split]), self.images[split])
            digest.update('\n'.join([split, *stamp_images(datasets[split], chosen)]).encode())
        if measure == 'segmentation':
            files = [file for some in self.pairs.values() for pair in some for file in pair]
            digest.update('\n'.join(map(stamp_file, files)).encode())
        return digest.hexdigest()

    @contextmanager
    def _maps(self) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        with token_maps_of(self.network.backbone) as all_maps:
            yield select_maps(all_maps, self.layers)

    def _images(self, split: str) -> Iterator[Tensor]:
        return spaced_images(self.cfg, split, self.images[split], **self.reading)

    def correspondence(self) -> dict[str, Any]:
        warps = rotations(self.step)
        if self.affine:
            warps |= {AFFINE: draw_warps(self.affine, seed=self.seed)}
        with self._maps() as token_maps:
            return correspondence_by_layer(token_maps, self._images('val'), warps, self.within)

    def angle(self) -> dict[str, Any]:
        train, val = (
            spaced_labelled(self.cfg, x, self.images[x], **self.reading) for x in ('train', 'val')
        )
        angles = [some[0].angle for some in rotations(self.step).values()]
        return accuracy_by_angle(self.network, train, val, angles)

    def position(self) -> dict[str, Any]:
        with self._maps() as token_maps:
            train, val = self._images('train'), self._images('val')
            return _position(token_maps, len(self.numbers), train, val)

    def segmentation(self) -> dict[str, Any]:
        classes = max(count_classes(some) for some in self.pairs.values())
        preprocessor, size = build_preprocessor(self.cfg), self.source.batch_size
        pipeline = evaluation_pipeline(self.cfg)
        load = TRANSFORMS.build(dict(pipeline[0])) if begins_by_loading(pipeline) else None

        def read(split: str) -> Iterable[tuple[Tensor, Tensor]]:
            pairs = self.pairs[split]
            batches = read_pairs(pairs, self.size, preprocessor, size, load)
            return tell_progress(batches, -(-len(pairs) // size), f'{split}: batch')

        with self._maps() as token_maps:
            scores = segmentation_by_layer(token_maps, read('train'), read('val'), classes)
        return dict(classes=classes, **scores)


def _position(
    token_maps: Callable[[Tensor], list[Tensor]],
    depth: int,
    train: Iterable[Tensor],
    val: Iterable[Tensor],
) -> dict[str, Any]:
    """The position probe of all blocks and of the pixels, in one pass."""

    def with_pixels(images: Tensor) -> list[Tensor]:
        maps = token_maps(images)
        pixels = pixels_as_map(images, maps[0].shape[-2:])
        return maps if pixels is None else [*maps, pixels]

    scores = position_by_layer(with_pixels, train, val)
    return dict(layers=scores[:depth], pixels=scores[depth] if scores[depth:] else None)


def report_dense(results: dict[str, Any]) -> str:
    """Tables in Markdown of what :func:`measure_dense` returned.

    Args:
        results (dict): Its measures.
    """
    header = [f'block {i}' for i in results['layers']]
    tables = []
    if 'correspondence' in results:
        tables += _report_correspondence(results['correspondence'], header)
    if 'angle' in results:
        tables.append(_report_angle(results['angle']))
    if 'position' in results:
        tables.append(_report_position(results['position'], header))
    if 'segmentation' in results:
        tables.append(_report_segmentation(results['segmentation'], header))
    return '\n\n'.join(tables)


def _report_correspondence(scores: dict[str, list[dict[str, float]]], header: list[str]) -> list:
    groups = summarize_angles(scores)
    titles = dict(matched='matched', wrong_image='wrong image', chance='chance', ceiling='ceiling')
    rows = [
        [
            f'{title}, {name}',
            *(statistics.mean(s[i][key] for s in some) for i in range(len(header))),
        ]
        for key, title in titles.items()
        for name, some in groups.items()
    ]
    angles = [
        [name, *(layer['matched'] for layer in layers)]
        for name, layers in scores.items()
        if name != AFFINE
    ]
    return [
        make_table(['correspondence', *header], rows),
        make_table(['matched by angle', *header], angles),
    ]


def _report_angle(scores: dict[str, dict[str, float]]) -> str:
    keys = ('knn', 'probe', 'knn_back', 'probe_back')
    rows = [
        [f'mean, {name}', *(statistics.mean(entry[key] for entry in some) for key in keys)]
        for name, some in summarize_angles(scores).items()
    ]
    rows += [[name, *(entry[key] for key in keys)] for name, entry in scores.items()]
    rows.append(['chance', *(next(iter(scores.values()))['chance'] for _ in keys)])
    header = ['accuracy by angle', 'k-NN', 'linear probe', 'k-NN, and back', 'probe, and back']
    return make_table(header, rows)


def _report_position(scores: dict[str, Any], header: list[str]) -> str:
    titles = dict(r2='R2', row='R2 of the row', column='R2 of the column')
    pixels = scores['pixels'] or dict.fromkeys(titles, math.nan)
    rows = [
        [title, *(layer[key] for layer in scores['layers']), pixels[key]]
        for key, title in titles.items()
    ]
    return make_table(['position', *header, 'pixels'], rows)


def _report_segmentation(scores: dict[str, Any], header: list[str]) -> str:
    rows = []
    for key, title in dict(linear='linear probe', nearest='nearest tokens').items():
        pixels = scores[f'{key}_pixels']
        rows.append([title, *scores[key], math.nan if pixels is None else pixels])
    for key in ('floor', 'ceiling'):
        rows.append([key, *(scores[key] for _ in header), '-'])
    return make_table([f'mIoU, {scores["classes"]} classes', *header, 'pixels'], rows)


def summarize_angles(scores: dict[str, Any]) -> dict[str, list[Any]]:
    """Put what was measured by angle into groups, those that have any.

    Args:
        scores (dict): By the name of an angle, or :data:`AFFINE`.

    Returns:
        dict[str, list]: The entries of 'quarter turns' (90, 180 and 270 degrees), of the angles
        'between' (without 0 too), and of 'affine'.
    """
    groups: dict[str, list[Any]] = {'quarter turns': [], 'between': [], AFFINE: []}
    for name, entry in scores.items():
        if name == AFFINE:
            groups[AFFINE].append(entry)
        elif float(name):
            groups['between' if float(name) % 90 else 'quarter turns'].append(entry)
    return {name: some for name, some in groups.items() if some}
