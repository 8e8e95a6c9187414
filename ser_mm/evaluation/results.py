"""Tables and files of results."""

import json
from collections.abc import Sequence
from pathlib import Path


def make_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table: the first column to the left, the others to the right.

    Args:
        header (Sequence[str]): Titles of the columns.
        rows (Sequence[Sequence]): Cells; a float is shown with three decimals.
    """
    lines = [[f'{x:.3f}' if isinstance(x, float) else str(x) for x in row] for row in rows]
    lines = [list(header), *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
    return '\n'.join(
        '| ' + ' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + ' |'
        for line in lines
    )


def write_results(out: Path, name: str, results: dict, text: str) -> None:
    """Write ``results`` as ``name``.json and ``text`` as ``name``.md, and print the text."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f'{name}.json').write_text(json.dumps(results, indent=1, default=str) + '\n')
    (out / f'{name}.md').write_text(f'{text}\n')
    print(f'\n{text}\n\nResults are in {out / name}.json and .md.')
