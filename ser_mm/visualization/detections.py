from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ser_mm.visualization._saving import save_figure


def draw_detections(
    images: Sequence[np.ndarray],
    detections: Mapping[str, Sequence[tuple]],
    classes: Sequence[str],
    file: str | Path,
) -> None:
    """Draw boxes and masks on images, one row per image, one column per source.

    Args:
        images (Sequence[np.ndarray]): Each (H, W, 3), uint8, RGB.
        detections (Mapping): By the title of its column, for each image its boxes (M, 4) as
            x1, y1, x2, y2, labels (M,) and masks (M, H, W), as arrays.
        classes (Sequence[str]): Names of the labels.
        file (str | Path): Image file to write.
    """
    rows, columns = len(images), len(detections)
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows), layout='constrained')
    panels = figure.subplots(rows, columns, squeeze=False)
    for column, (title, found) in zip(panels.T, detections.items(), strict=True):
        column[0].set_title(title)
        for panel, image, (boxes, labels, masks) in zip(column, images, found, strict=True):
            panel.imshow(image)
            panel.set(xticks=[], yticks=[])
            for (x1, y1, x2, y2), label, mask in zip(boxes, labels, masks, strict=True):
                colour = f'C{label % 10}'
                panel.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, edgecolor=colour, facecolor='none')
                )
                panel.contourf(mask, levels=[0.5, 1], colors=[colour], alpha=0.4)
                panel.text(x1, y1 - 2, classes[label], color=colour, fontsize=9, weight='bold')
    save_figure(figure, file)
