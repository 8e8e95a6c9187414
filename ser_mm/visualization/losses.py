import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def read_scalars(work_dir: str | Path) -> list[dict]:
    """What MMEngine logged of a run, in order of the iterations.

    A run that was resumed has one log per start; where they overlap, the last one counts.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per logged iteration: ``step``, ``loss``, ``lr``, ``time``, ...
    """
    records = {}
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed, or is just now writing the line
                continue
            if 'loss' in record:
                records[record['step']] = record
    return [records[step] for step in sorted(records)]


def draw_losses(
    runs: Mapping[str, str | Path],
    file: str | Path,
    terms: tuple[str, ...] = ('loss_inv', 'loss_ser'),
) -> None:
    """Draw loss terms over iterations, one panel per term, one curve per run.

    Args:
        runs (Mapping): Work dir of each run, by the name to show.
        file (str | Path): Image file to write.
        terms (tuple[str, ...]): Loss terms. ``loss_inv`` of a run that has no such term, one of the
            base algorithm alone, is its ``loss``. A term that is 0 throughout, its weight being 0,
            is left out. Defaults to ('loss_inv', 'loss_ser').
    """
    figure = Figure(figsize=(5 * len(terms), 3.5), layout='constrained')
    panels = figure.subplots(1, len(terms), squeeze=False)[0]
    for index, (name, work_dir) in enumerate(runs.items()):
        records = read_scalars(work_dir)
        for panel, term in zip(panels, terms, strict=True):
            found = [(r['step'], r[term]) for r in records if term in r]
            if not found and term == 'loss_inv':
                found = [(r['step'], r['loss']) for r in records]
            if any(value for _, value in found):
                panel.plot(*zip(*found, strict=True), color=f'C{index}', label=name)
    for panel, term in zip(panels, terms, strict=True):
        panel.set(xlabel='iteration', title=term)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    figure.savefig(file, dpi=150)
