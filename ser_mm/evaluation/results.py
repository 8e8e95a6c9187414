"""Tables and files of results."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ser_mm.files import write_text


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample, the latter 0 for one value.

    Args:
        values (Sequence[float]): One or more.
    """
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_mean(values: Sequence[float], form: str = '.3f') -> str:
    """Mean of a sample and, if its values differ, standard deviation: '0.640 ± 0.019'.

    Args:
        values (Sequence[float]): One or more; '-' is shown where one is nan, not measured.
        form (str): Format of both. Defaults to '.3f'.
    """
    if any(map(math.isnan, values)):
        return '-'
    mean, deviation = mean_and_deviation(values)
    return f'{mean:{form}} ± {deviation:{form}}' if len(set(values)) > 1 else f'{mean:{form}}'


def describe_seeds(seeds: Sequence[int]) -> str:
    """What a table says of the seeds that its figures are from."""
    return f'seeds {list(seeds)}' + (': mean ± standard deviation.' if len(seeds) > 1 else '.')


def make_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    Args:
        header (Sequence[str]): Titles of the columns.
        rows (Sequence[Sequence]): Cells; a float is shown with three decimals.
    """
    lines = [[f'{x:.3f}' if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [list(header), *lines]
    # Below a title are a dash and a colon at least.
    widths = [max(2, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
    return '\n'.join(
        '| ' + ' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + ' |'
        for line in lines
    )


def write_results(out: Path, name: str, results: dict, text: str) -> None:
    """Write ``results`` as ``name``.json and ``text`` as ``name``.md, and print the text.

    Args:
        out (Path): Folder to write to.
        name (str): Name of both files.
        results (dict): What JSON can hold; of anything else its ``str`` is written, and null of a
            figure that is nan or infinite.
        text (str): Markdown.
    """
    held = json.dumps(results, default=str)
    # JSON has no word for what is not a number.
    finite = json.loads(held, parse_constant=lambda word: None)
    write_text(out / f'{name}.json', json.dumps(finite, indent=1) + '\n')
    write_text(out / f'{name}.md', f'{text}\n')
    print(f'\n{text}\n\nResults are in {out / name}.json and .md.')
