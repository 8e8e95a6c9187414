from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ser_mm.visualization._saving import save_figure


def draw_tsne(
    panels: Sequence[Sequence[tuple[str, np.ndarray, np.ndarray]]],
    classes: Sequence[str],
    file: str | Path,
) -> None:
    """Draw maps of features, one colour per class.

    Args:
        panels (Sequence[Sequence[tuple]]): Rows of panels, each a title, places (N, 2) and labels
            (N,), which index ``classes``.
        classes (Sequence[str]): Names, for the legend.
        file (str | Path): Image file to write.
    """
    rows, columns = len(panels), len(panels[0])
    figure = Figure(figsize=(4 * columns + 2, 4 * rows), layout='constrained')
    colors = colormaps['tab20' if len(classes) <= 20 else 'turbo']
    colors = colors(
        np.arange(len(classes)) if len(classes) <= 20 else np.linspace(0, 1, len(classes))
    )
    for axes, row in zip(figure.subplots(rows, columns, squeeze=False), panels, strict=True):
        for axis, (title, places, labels) in zip(axes, row, strict=True):
            for label, color in enumerate(colors):
                own = places[labels == label]
                axis.scatter(*own.T, s=4, color=color, label=classes[label])
            axis.set(title=title, xticks=[], yticks=[])
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside right upper', fontsize='small', markerscale=3)
    save_figure(figure, file)
