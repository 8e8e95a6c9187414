from collections.abc import Callable

import torch
from torch import Tensor

from ser_mm import geometry


@torch.no_grad()
def equivariance_score(
    token_map: Callable[[Tensor], Tensor],
    images: Tensor,
    elements: int | Tensor = 0,
    grid: tuple[int, int] | None = None,
    batch_size: int = 256,
) -> float:
    r"""R2 of transformed token maps as predictions of the maps of transformed images.

    For images :math:`x` and a group element :math:`g = S \circ D`,

    .. math::
        R^2 = 1 - \frac{\sum \lVert \rho_g F(x) - F(g x) \rVert^2}
            {\sum \lVert F(g x) - \overline{F(g x)} \rVert^2}

    Sums run over images, tokens and channels; the mean is, per channel, over images and tokens. 1
    is exact equivariance, 0 is what predicting the mean token gives, and there is no lower bound.
    The score does not change when the features are rescaled or shifted. Both :math:`g` and
    :math:`\rho_g` are :func:`ser_mm.geometry.act`.

    Args:
        token_map (Callable): Maps images (N, 3, H, W) to token maps (N, C, h, w), for any H and W
            that are whole numbers of patches. A network has to be in eval mode.
        images (Tensor): Shape (N, 3, H, W).
        elements (int | Tensor): D4 element, by number as in :mod:`ser_mm.geometry`, of all images
            or, with shape (N,), of each. Defaults to 0, the identity.
        grid (tuple[int, int], optional): Height and width in tokens that the images are resized
            to. Defaults to None: that of the images themselves, which must then be square if an
            element turns by 90 degrees.
        batch_size (int): Images per call of ``token_map``. Defaults to 256.

    Returns:
        float: The score; nan if all tokens of all transformed images are the same.
    """
    elements = torch.as_tensor(elements, device=images.device).expand(len(images))
    error = square = total = count = 0
    for x, g in zip(
        images.split(batch_size), geometry.matrices(elements).split(batch_size), strict=True
    ):
        before = token_map(x)
        height, width = before.shape[-2:]
        size = grid or (height, width)
        pixels = size[0] * (x.shape[-2] // height), size[1] * (x.shape[-1] // width)
        after = token_map(geometry.act(x, g, pixels)).double()
        predicted = geometry.act(before.double(), g, size)
        error += (predicted - after).square().sum()
        square += after.square().sum()
        total += after.sum(dim=(0, 2, 3))
        count += after.shape[0] * after.shape[2] * after.shape[3]
    variance = square - total.square().sum() / count
    return float(1 - error / variance) if variance > 1e-12 * square else float('nan')
