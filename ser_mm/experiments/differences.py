"""What a comparison found: tables with paired differences, and curves by angle and by block."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ser_mm.evaluation.dense import AFFINE
from ser_mm.evaluation.metrics import paired_difference
from ser_mm.evaluation.results import (
    describe_seeds,
    format_mean,
    make_table,
    mean_and_deviation,
)
from ser_mm.visualization import draw_curves

COLUMNS = dict(
    probe='linear probe',
    knn='k-NN',
    probe_turned='probe, turned images',
    corruptions='probe, corruptions',
    angle='probe, mean of angles',
    r2='R2 at SER layer',
    retrieval='retrieval at SER layer',
    r2_last='R2 at last block',
    matched='correspondence, affine, at SER layer',
    matched_last='correspondence, affine, last block',
    matched_turns_last='correspondence, quarter turns, last block',
    position_last='position R2, last block',
    rankme='RankMe',
    box_map='box mAP, frozen',
)
"""Figures of a run, one number each, and their titles."""
PAIRS = (
    ('SER', 'baseline'),
    ('SER', 'views only'),
    ('SER', 'late [CLS]'),
    ('late [CLS]', 'baseline'),
    ('views only', 'late [CLS]'),
)
"""Differences that are reported. The last two are parts of the first."""
DIFFERENCE = ('95 % interval', 'p', 'positive')
"""Titles of what is told of a mean difference."""


def read_comparison(file: Path, option: str) -> dict[str, Any]:
    """Read what :func:`~ser_mm.experiments.comparison.compare` wrote.

    Args:
        file (Path): Its JSON file.
        option (str): Option that names the file or its folder, for messages.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{option} {file} is no file; name the JSON of a comparison.')
    try:
        found = json.loads(file.read_text())
        whole = bool(found['runs']) and all({'arm', 'seed'} <= run.keys() for run in found['runs'])
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f'{option} {file} holds no runs of a comparison; name the JSON of one.')
    return found


def report_comparison(results: dict[str, Any]) -> str:
    """Tables in Markdown: means and deviations by arm, and paired differences.

    Args:
        results (dict): What :func:`~ser_mm.experiments.comparison.compare` wrote.
    """
    by_arm: dict[str, dict[int, dict]] = {}
    for run in results['runs']:
        by_arm.setdefault(run['arm'], {})[run['seed']] = run
    columns = {k: t for k, t in COLUMNS.items() if any(k in run for run in results['runs'])}
    rows = [
        [
            title,
            *(_format_figure([*_values(x, key).values()], len(x)) for x in by_arm.values()),
        ]
        for key, title in columns.items()
    ]
    counts = ['runs', *(len(runs) for runs in by_arm.values())]
    tables = [make_table(['figure', *by_arm], [*rows, counts])]
    for one, other in PAIRS:
        seeds = sorted(by_arm.get(one, {}).keys() & by_arm.get(other, {}).keys())
        if len(seeds) < 2:
            continue
        rows = []
        for key, title in columns.items():
            values = [_values(by_arm[arm], key) for arm in (one, other)]
            shared = sorted(values[0].keys() & values[1].keys())
            if len(shared) > 1:
                pair = ([found[seed] for seed in shared] for found in values)
                rows.append([title, *describe_difference(*pair)])
        header = [f'{one} - {other}', 'mean', *DIFFERENCE]
        tables.append(make_table(header, rows))
    seeds = sorted({run['seed'] for run in results['runs']})
    tables.append(
        f'{describe_seeds(seeds).capitalize()} Differences are paired by seed; intervals and p '
        "are of Student's t, uncorrected for the number of comparisons."
    )
    counts = Counter(run['precision'] for run in results['runs'] if run.get('precision'))
    if len(counts) > 1:
        told = ', '.join(f'in {name} {count}' for name, count in sorted(counts.items()))
        tables.append(f'Runs trained {told}; what differs between these may come of that.')
    return '\n\n'.join(tables)


def _format_figure(values: Sequence[float], runs: int) -> str:
    """A cell of a table: a mean that is not of all runs says of how many it is."""
    if not values:
        return '-'
    return format_mean(values) + (f' ({len(values)} of {runs})' if len(values) < runs else '')


def describe_difference(one: Sequence[float], other: Sequence[float]) -> list[str]:
    """Cells of a table: the mean difference of paired values, and :data:`DIFFERENCE`.

    Args:
        one (Sequence[float]): Two or more values.
        other (Sequence[float]): As many, in the same order.
    """
    found = paired_difference(one, other)
    low, high = found['interval']
    tested = not math.isnan(found['p'])
    return [
        f'{found["mean"]:+.4f}',
        f'{low:+.4f} to {high:+.4f}' if tested else '-',
        f'{found["p"]:.3f}' if tested else '-',
        f'{found["positive"]} of {len(one)}',
    ]


def draw_comparison(results: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what depends on the angle and on the block, with standard deviations over seeds.

    Args:
        results (dict): What :func:`~ser_mm.experiments.comparison.compare` wrote.
        stem (Path): Place and beginning of the names of the figures.

    Returns:
        list[Path]: The figures, ``..._angles.png`` and ``..._blocks.png``; none where nothing of
        them was measured.
    """
    layer = results['about']['ser_layer']
    figures: dict[str, dict[str, Callable[[dict], Mapping[Any, float]]]] = dict(
        angles={
            'linear probe': lambda run: {
                x: entry['probe'] for x, entry in run['accuracy_by_angle'].items()
            },
            f'tokens matched, block {layer}': lambda run: _matched(run, layer - 1),
            'tokens matched, last block': lambda run: _matched(run, -1),
        },
        blocks={
            'R2, quarter turn': lambda run: _by_block(run['layers']['rot90'], 'r2'),
            'R2, mixture': lambda run: _by_block(run['layers']['mixture'], 'r2'),
            'tokens matched, affine': lambda run: _by_block(
                run['correspondence'][AFFINE], 'matched'
            ),
            'position R2': lambda run: _by_block(run['position']['layers'], 'r2'),
        },
    )
    drawn = []
    for name, curves in figures.items():
        panels: dict[str, dict[str, Any]] = {}
        for title, curve in curves.items():
            by_arm: dict[str, list[Mapping[Any, float]]] = {}
            for run in results['runs']:
                with suppress(KeyError):  # not measured
                    by_arm.setdefault(run['arm'], []).append(curve(run))
            panels[title] = {
                arm: [
                    (float(x), *mean_and_deviation([found[x] for found in some])) for x in some[0]
                ]
                for arm, some in by_arm.items()
                if some
            }
        panels = {title: arms for title, arms in panels.items() if arms}
        if panels:
            drawn.append(stem.with_name(f'{stem.name}_{name}.png'))
            draw_curves(panels, drawn[-1], dict(angles='degrees', blocks='block')[name], 2)
    return drawn


def _matched(run: dict, at: int) -> dict[str, float]:
    """The share of tokens that are matched after a block, by angle."""
    found = run['correspondence'].items()
    return {angle: layers[at]['matched'] for angle, layers in found if angle != AFFINE}


def _by_block(entries: Sequence[Mapping[str, float]], key: str) -> dict[int, float]:
    return {i: entry[key] for i, entry in enumerate(entries, 1)}


def _values(runs: Mapping[int, dict], key: str) -> dict[int, float]:
    """By seed, where it was measured, and is a number: the R2 of a constant map is none."""
    found = {seed: run.get(key) for seed, run in runs.items()}
    return {seed: x for seed, x in found.items() if isinstance(x, float | int) and x == x}
