"""What token maps are good for, measure by measure, of one network."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor

from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.correspondence import correspondence_by_layer
from ser_mm.evaluation.data import spaced_images
from ser_mm.evaluation.features import Embedder
from ser_mm.evaluation.results import make_table
from ser_mm.evaluation.warping import draw_warps, rotations

MEASURES = ('correspondence',)
"""Measures of :func:`measure_dense`."""

AFFINE = 'affine'
"""Name of the warps that are drawn, beside the angles."""


def check_measures(measures: Sequence[str]) -> None:
    """Check names of measures.

    Raises:
        ValueError: If one is not in ``MEASURES``, or none is given.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown or not measures:
        raise ValueError(f'measures={list(measures)}: choose one or more of {", ".join(MEASURES)}.')


def select_maps(
    token_maps: Callable[[Tensor], Sequence[Tensor]], blocks: Sequence[int] | None = None
) -> Callable[[Tensor], list[Tensor]]:
    """Some of the token maps of a network, checked.

    Args:
        token_maps (Callable): See :func:`~ser_mm.evaluation.token_maps_of`.
        blocks (Sequence[int], optional): Blocks of a ViT, or stages of a ResNet, counted from 1.
            Defaults to None: all.

    Returns:
        Callable: Maps images (N, 3, H, W) to token maps (N, C, h, w), one per block. It raises a
        ValueError if the network has not so many, or a block gives no map.
    """

    def select(images: Tensor) -> list[Tensor]:
        maps = list(token_maps(images))
        missing = [i for i in blocks or () if not 1 <= i <= len(maps)]
        if missing:
            raise ValueError(
                f'blocks={list(blocks or ())}: the network has {len(maps)}, counted from 1; leave '
                f'out {missing[0]}.'
            )
        maps = [maps[i - 1] for i in blocks] if blocks else maps
        odd = next((tuple(f.shape) for f in maps if f.ndim != 4), None)
        if odd:
            raise ValueError(
                f'a block gives {odd}, not a token map (N, C, h, w); use a network with maps, '
                "out_type='featmap' where it has an out_type."
            )
        return maps

    return select


def measure_dense(
    cfg: Config,
    checkpoint: str | None,
    measures: Sequence[str] = MEASURES,
    blocks: Sequence[int] | None = None,
    images: int = 200,
    step: float = 15,
    affine: int = 8,
    within: float = 1.0,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the token maps of a frozen network.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
        checkpoint (str, optional): Its weights. None for the untrained network.
        measures (Sequence[str]): Of ``MEASURES``, all by default.
        blocks (Sequence[int], optional): Blocks of a ViT or stages of a ResNet, counted from 1.
            Defaults to None: all.
        images (int): Validation images, at most, at equal distances. Defaults to 200.
        step (float): Degrees between two angles. Defaults to 15.
        affine (int): Of 'correspondence', warps that are drawn, see
            :func:`~ser_mm.evaluation.warping.draw_warps`. Defaults to 8.
        within (float): Of 'correspondence', distance in tokens up to which a match is right.
            Defaults to 1.0.
        batch_size (int): Images per step. Defaults to 64.
        num_workers (int): Processes that read images. Defaults to 0.
        seed (int): Of the untrained network and of what is drawn. Defaults to 0.

    Returns:
        dict[str, Any]: ``blocks``, the numbers of the blocks, and by measure:

        - ``correspondence``: see
          :func:`~ser_mm.evaluation.correspondence.correspondence_by_layer`, by angle and for
          'affine', all drawn warps together.

    Raises:
        ValueError: If a measure or a block is unknown, an image cannot be read, or the network
            gives no maps.
    """
    check_measures(measures)
    set_random_seed(seed)
    network = Embedder(cfg, checkpoint)
    found: dict[str, Any] = {}

    def validation() -> Any:
        return spaced_images(cfg, 'val', images, batch_size, num_workers)

    with token_maps_of(network.backbone) as all_maps:
        first = next(spaced_images(cfg, 'val', 1))
        depth = len(select_maps(all_maps, blocks)(first))
        found['blocks'] = list(blocks or range(1, depth + 1))
        token_maps = select_maps(all_maps, blocks)
        if 'correspondence' in measures:
            warps = rotations(step) | ({AFFINE: draw_warps(affine, seed=seed)} if affine else {})
            found['correspondence'] = correspondence_by_layer(
                token_maps, validation(), warps, within
            )
    return found


def report_dense(results: dict[str, Any]) -> str:
    """Tables in Markdown of what :func:`measure_dense` returned.

    Args:
        results (dict): Its measures.
    """
    header = [f'block {i}' for i in results['blocks']]
    tables = []
    if 'correspondence' in results:
        tables += _report_correspondence(results['correspondence'], header)
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
