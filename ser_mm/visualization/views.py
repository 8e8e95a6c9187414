from copy import deepcopy
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.geometry import ELEMENT_NAMES


def restore_images(images: Tensor, preprocessor: BaseDataPreprocessor) -> Tensor:
    """Undo the normalization, for display.

    Args:
        images (Tensor): What ``preprocessor`` gave, shape (N, 3, H, W).
        preprocessor (BaseDataPreprocessor): With ``mean`` and ``std`` of pixels in 0 to 255.

    Returns:
        Tensor: Values in [0, 1], shape (N, H, W, 3), on the CPU.
    """
    pixels = images * preprocessor.std + preprocessor.mean
    return (pixels / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu()


def draw_views(cfg: Config, file: str | Path, num_images: int = 6) -> None:
    """Draw both views of some images of b1 and of b2, as training sees them.

    They come from the data loader and preprocessor of the config. Views of b2 have as title the D4
    element that moved them and their size in pixels after the resize.

    Args:
        cfg (Config): Config of a SER run.
        file (str | Path): Image file to write.
        num_images (int): Images of each of b1 and b2, at most. Defaults to 6.

    Raises:
        ValueError: If no batch of an epoch has an image in b2.
    """
    init_default_scope(cfg.default_scope)
    loader = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    batches = (preprocessor(batch, training=True)['inputs'][:2] for batch in loader)
    views = next((views for views in batches if len(views[0].equi)), None)
    if views is None:
        raise ValueError('draw_views: no image of the epoch is in b2; raise equi_ratio.')

    figure = Figure(figsize=(1.7 * num_images, 7.5), layout='constrained')
    for part, (name, rows) in zip(
        figure.subfigures(2, 1),
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
            images = restore_images(images[:num_images], preprocessor)
            for column, image in enumerate(images):
                panel = panels[row, column]
                panel.imshow(image)
                title = f'view {row + 1}'
                if name.startswith('b2'):
                    height, width = image.shape[:2]
                    title = f'{ELEMENT_NAMES[view.elements[column]]}, {height} x {width}'
                panel.set_title(title, fontsize=8)
    figure.savefig(file, dpi=150)
