from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ser_mm.visualization._saving import save_figure


def draw_losses(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    file: str | Path,
    terms: tuple[str, ...] = ('loss_inv', 'loss_ser'),
) -> None:
    """Draw loss terms over iterations, one panel per term, one curve per run.

    Args:
        runs (Mapping): What was logged of each run, by the name to show: a record per iteration,
            see :func:`ser_mm.engine.logs.read_scalars`.
        file (str | Path): Image file to write.
        terms (tuple[str, ...]): Loss terms. ``loss_inv`` of a run that has no such term, one of the
            base algorithm alone, is its ``loss``. A term that is 0 throughout, its weight being 0,
            is left out. Defaults to ('loss_inv', 'loss_ser').
    """
    figure = Figure(figsize=(5 * len(terms), 3.5), layout='constrained')
    panels = figure.subplots(1, len(terms), squeeze=False)[0]
    for index, (name, records) in enumerate(runs.items()):
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
    save_figure(figure, file)
