from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from torch import Tensor

from ser_mm import geometry
from ser_mm.visualization._saving import save_figure


@torch.no_grad()
def draw_token_maps(
    token_maps: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    restore: Callable[[Tensor], Tensor],
    file: str | Path,
    element: int = 1,
    grid: tuple[int, int] | None = None,
    shown: int = 0,
) -> None:
    """Draw token maps before and after rho beside the map that they should match.

    One row per network: x, g x, F(x), rho_g F(x), F(g x). Colours are the first three principal
    components of the network's tokens, the same projection and range in all panels of a row.

    Args:
        token_maps (Mapping): Networks in eval mode, images (N, 3, H, W) to maps (N, C, h, w), by
            the name to show.
        images (Tensor): Shape (N, 3, H, W). All of them determine the projection.
        restore (Callable): Makes displayable images, (N, H, W, 3) in [0, 1], of ``images``.
        file (str | Path): Image file to write.
        element (int): D4 element of g, by number as in :mod:`ser_mm.geometry`. Defaults to 1, a
            quarter turn counter-clockwise.
        grid (tuple[int, int], optional): Height and width in tokens that g resizes to. Defaults
            to None: no resize.
        shown (int): Index of the image to show. Defaults to 0.
    """
    matrix = geometry.matrices(torch.full((len(images),), element, device=images.device))
    figure = Figure(figsize=(10, 2.2 * len(token_maps)), layout='constrained')
    panels = figure.subplots(len(token_maps), 5, squeeze=False)
    for panel, title in zip(
        panels[0], ['x', 'g x', 'F(x)', r'$\rho_g$ F(x)', 'F(g x)'], strict=True
    ):
        panel.set_title(title)
    for row, (name, token_map) in zip(panels, token_maps.items(), strict=True):
        before = token_map(images)
        height, width = before.shape[-2:]
        size = grid or (height, width)
        pixels = size[0] * (images.shape[-2] // height), size[1] * (images.shape[-1] // width)
        moved = geometry.act(images, matrix, pixels)
        maps = [before, geometry.act(before, matrix, size), token_map(moved)]
        colours = _colours([x.cpu() for x in maps])
        pictures = [restore(images)[shown], restore(moved)[shown], *(x[shown] for x in colours)]
        for panel, picture in zip(row, pictures, strict=True):
            panel.imshow(picture)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    save_figure(figure, file)


def _colours(maps: list[Tensor]) -> list[Tensor]:
    """Maps (N, C, h, w) as (N, h, w, 3) in [0, 1], by the components of the first and the last."""
    tokens = [x.permute(0, 2, 3, 1) for x in maps]
    pca = PCA(3).fit(torch.cat([tokens[0].flatten(0, 2), tokens[-1].flatten(0, 2)]).numpy())
    projected = [
        torch.from_numpy(pca.transform(x.flatten(0, 2).numpy())).reshape(*x.shape[:3], 3)
        for x in tokens
    ]
    low, high = torch.quantile(projected[-1].flatten(0, 2), torch.tensor([0.02, 0.98]), dim=0)
    return [((x - low) / (high - low)).clamp(0, 1) for x in projected]
