"""What token maps are good for, measure by measure, of one network."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor

from ser_mm.evaluation.angles import accuracy_by_angle
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.correspondence import correspondence_by_layer
from ser_mm.evaluation.data import build_preprocessor, spaced_images, spaced_labelled
from ser_mm.evaluation.features import Embedder
from ser_mm.evaluation.positions import pixels_as_map, position_by_layer
from ser_mm.evaluation.results import make_table
from ser_mm.evaluation.segmentation import (
    count_classes,
    find_pairs,
    read_pairs,
    segmentation_by_layer,
)
from ser_mm.evaluation.warping import draw_warps, rotations

MEASURES = ('correspondence', 'angle', 'position', 'segmentation')
"""Measures of :func:`measure_dense`."""

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
        if not all(f.isfinite().all() for f in maps):
            raise ValueError(
                'a block gives numbers that are not finite; the training of this checkpoint has '
                'diverged, so take an earlier one.'
            )
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
) -> dict[str, Any]:
    """Measure the token maps of a frozen network.

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
        ValueError: If a measure or a block is unknown, an image cannot be read, or the network
            gives no maps.
    """
    measures = check_measures(measures, masks)
    pairs = {x: find_pairs(masks, x) for x in ('train', 'val')} if masks is not None else {}
    set_random_seed(seed)
    network = Embedder(cfg, checkpoint)
    found: dict[str, Any] = dict(layers=[])
    reading = dict(batch_size=batch_size, num_workers=num_workers)
    if set(measures) - {'angle'}:  # what cannot be measured is told before what takes long
        with token_maps_of(network.backbone) as all_maps:
            image = next(spaced_images(cfg, 'val', 1))
            maps = select_maps(all_maps, layers)(image)
        found['layers'] = list(layers or range(1, len(maps) + 1))
    if 'angle' in measures:
        print('accuracy against angle', flush=True)
        train = spaced_labelled(cfg, 'train', train_images, **reading)
        val = spaced_labelled(cfg, 'val', images, **reading)
        angles = [some[0].angle for some in rotations(step).values()]
        found['angle'] = accuracy_by_angle(network, train, val, angles)
    with token_maps_of(network.backbone) as all_maps:
        token_maps = select_maps(all_maps, layers)
        if 'correspondence' in measures:
            print('correspondence', flush=True)
            warps = rotations(step) | ({AFFINE: draw_warps(affine, seed=seed)} if affine else {})
            val = spaced_images(cfg, 'val', images, **reading)
            found['correspondence'] = correspondence_by_layer(token_maps, val, warps, within)
        if 'position' in measures:
            print('position probe', flush=True)
            train = spaced_images(cfg, 'train', train_images, **reading)
            val = spaced_images(cfg, 'val', images, **reading)
            found['position'] = _position(token_maps, len(found['layers']), train, val)
        if 'segmentation' in measures:
            print('segmentation', flush=True)
            classes = max(count_classes(some) for some in pairs.values())
            preprocessor = build_preprocessor(cfg)
            train, val = (
                read_pairs(pairs[x], image.shape[-2:], preprocessor, batch_size)
                for x in ('train', 'val')
            )
            scores = segmentation_by_layer(token_maps, train, val, classes)
            found['segmentation'] = dict(classes=classes, **scores)
    return found


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
