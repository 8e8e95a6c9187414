from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL.Image import Image

from ser_mm.visualization._saving import save_figure


def draw_neighbours(rows: Sequence[Sequence[Image]], file: str | Path) -> None:
    """Draw images beside those that are nearest to them.

    Args:
        rows (Sequence[Sequence[Image]]): In each row an image, then its neighbours.
        file (str | Path): Image file to write.
    """
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.5 * columns, 1.5 * len(rows)), layout='constrained')
    for panels, images in zip(
        figure.subplots(len(rows), columns, squeeze=False), rows, strict=True
    ):
        for panel in panels:
            panel.axis('off')
        for panel, image in zip(panels, images, strict=False):
            panel.imshow(image)
    save_figure(figure, file)
