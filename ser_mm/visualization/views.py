from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from ser_mm.geometry import ELEMENT_NAMES
from ser_mm.views import ViewBatch
from ser_mm.visualization._saving import save_figure


def restore_images(images: Tensor, preprocessor: BaseDataPreprocessor) -> Tensor:
    """Undo the normalization, for display.

    Args:
        images (Tensor): What ``preprocessor`` gave, shape (N, C, H, W). One or two channels are
            shown in grey, by the first; of more than three, the first three in colours.
        preprocessor (BaseDataPreprocessor): With ``mean`` and ``std`` of pixels in 0 to 255.

    Returns:
        Tensor: Values in [0, 1], shape (N, H, W, 3), on the CPU.
    """
    pixels = images * preprocessor.std + preprocessor.mean
    channels = pixels.shape[1]
    pixels = pixels[:, :3] if channels > 2 else pixels[:, :1].expand(-1, 3, -1, -1)
    return (pixels / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu()


def draw_views(
    views: Sequence[ViewBatch],
    restore: Callable[[Tensor], Tensor],
    file: str | Path,
    num_images: int = 6,
) -> None:
    """Draw the views of some images of b1 and of b2, as training sees them.

    The title of a view of b2 is the D4 element that moved it and its size after the resize.

    Args:
        views (Sequence[ViewBatch]): The two views of a batch.
        restore (Callable): Makes displayable images, (N, H, W, 3) in [0, 1], of those in ``views``,
            as :func:`restore_images` does.
        file (str | Path): Image file to write.
        num_images (int): Images of each of b1 and b2, at most. Defaults to 6.
    """
    figure = Figure(figsize=(1.7 * num_images, 7.5), layout='constrained')
    for part, (name, rows) in zip(
        figure.subfigures(2, 1, squeeze=False).flatten(),
        {
            'b1: views of the base policy': [view.base for view in views],
            'b2: one crop, two photometric draws, an element of D4 and a resize per view': [
                view.equi for view in views
            ],
        }.items(),
        strict=True,
    ):
        part.suptitle(name)
        panels = part.subplots(2, num_images, squeeze=False)
        for panel in panels.flat:
            panel.axis('off')
        for row, (images, view) in enumerate(zip(rows, views, strict=True)):
            images = restore(images[:num_images])
            for column, image in enumerate(images):
                panel = panels[row, column]
                panel.imshow(image)
                title = f'view {row + 1}'
                if name.startswith('b2'):
                    height, width = image.shape[:2]
                    title = f'{ELEMENT_NAMES[view.elements[column]]}, {height} x {width}'
                panel.set_title(title, fontsize=8)
    save_figure(figure, file)
