from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ser_mm.visualization._saving import save_figure

Curve = Sequence[tuple[float | str, float, float]]
"""The points of a curve, each with a place, a height and half an error bar (0 for none)."""


def draw_curves(
    panels: Mapping[str, Mapping[str, Curve]],
    file: str | Path,
    xlabel: str = '',
    columns: int = 3,
) -> None:
    """Draw curves with error bars, one panel per quantity, one curve per name.

    Args:
        panels (Mapping): Curves by name, by the title of their panel. The same name has the same
            colour in all panels.
        file (str | Path): Image file to write.
        xlabel (str): What the horizontal axes show. Defaults to ''.
        columns (int): Panels side by side. Defaults to 3.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, points in curves.items():
            x, y, error = zip(*points, strict=True)
            bars = dict(yerr=error, capsize=3) if any(error) else {}
            axis.errorbar(x, y, **bars, marker='.', color=f'C{names.index(name)}', label=name)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles: dict[str, Any] = {}
    for axis in axes[: len(panels)]:
        handles |= {
            label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    if len(handles) > 1:
        for ncols in range(len(handles), 0, -1):
            legend = figure.legend(
                [*handles.values()], [*handles], loc='outside lower center', ncols=ncols
            )
            if legend.get_window_extent().width < figure.bbox.width or ncols == 1:
                break
            legend.remove()
    save_figure(figure, file)
