"""Position probe: how well the place of a token can be read from it."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_mm.evaluation.warping import cell_centres


class Ridge:
    """Ridge regression on standardized features in float64, from sums over batches.

    As scikit-learn's ``make_pipeline(StandardScaler(), Ridge(alpha))``, without keeping the
    features.

    Args:
        alpha (float): Weight of the squared norm beside the summed squared error. Defaults to 1.0.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self._shift: Tensor | None = None
        self._count = 0

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take features (N, C) and targets (N, K)."""
        x, y = features.double(), targets.to(features.device).double()
        if self._shift is None:  # sums of squares about 0 would lose digits to a large mean
            self._shift = x.mean(dim=0)
            width = x.shape[1]
            self._sums = x.new_zeros(width), y.new_zeros(y.shape[1])
            self._squares = x.new_zeros(width, width)
            self._products = x.new_zeros(width, y.shape[1])
        x = x - self._shift
        self._sums[0].add_(x.sum(dim=0))
        self._sums[1].add_(y.sum(dim=0))
        self._squares += x.T @ x
        self._products += x.T @ y
        self._count += len(x)

    def solve(self) -> Callable[[Tensor], Tensor]:
        """Fit.

        Returns:
            Callable: Maps features (N, C) to predictions (N, K), float64.

        Raises:
            ValueError: If nothing was added.
        """
        if self._shift is None:
            raise ValueError('Ridge: there are no features to fit on.')
        shift = self._shift
        mean, target = (total / self._count for total in self._sums)
        covariance = self._squares - self._count * torch.outer(mean, mean)
        variance = covariance.diagonal() / self._count
        # A feature that is the same everywhere is left as it is, at 0.
        varies = variance > (1e-12 * shift) ** 2
        scale = torch.where(varies, variance, 1).sqrt()
        products = self._products - self._count * torch.outer(mean, target)
        penalty = self.alpha * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        weight = torch.linalg.solve(
            covariance / torch.outer(scale, scale) + penalty, products / scale[:, None]
        )
        weight = weight / scale[:, None]
        return lambda features: (features.double() - shift - mean) @ weight + target


def _tokens(token_map: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N h w, C) of maps, and their columns and rows in [-1, 1], (N h w, 2)."""
    places = cell_centres(token_map.shape[-2:], (2, 2)).to(token_map.device)
    return token_map.flatten(2).transpose(1, 2).flatten(0, 1), places.repeat(len(token_map), 1)


@torch.no_grad()
def position_by_layer(
    token_maps: Callable[[Tensor], Sequence[Tensor]],
    train: Iterable[Tensor],
    val: Iterable[Tensor],
    alpha: float = 1.0,
) -> list[dict[str, float]]:
    """R2 of the row and the column of a token, predicted from it by ridge regression.

    Args:
        token_maps (Callable): Maps images (N, 3, H, W) to token maps (N, C, h, w), one per layer. A
            network has to be in eval mode, see :func:`~ser_mm.evaluation.token_maps_of`.
        train (Iterable[Tensor]): Images to fit on, (N, 3, H, W) each.
        val (Iterable[Tensor]): Other images, to score on.
        alpha (float): See :class:`Ridge`. Defaults to 1.0.

    Returns:
        list[dict[str, float]]: Of each layer ``row``, ``column`` and ``r2``, both together. 1 is
        exact, 0 is what predicting the middle gives; nan if a map has no second row or column.

    Raises:
        ValueError: If there is no image to fit on or to score on.
    """
    ridges: list[Ridge] = []
    for x in train:
        maps = token_maps(x)
        ridges = ridges or [Ridge(alpha) for _ in maps]
        for ridge, f in zip(ridges, maps, strict=True):
            ridge.add(*_tokens(f))
    predict = [ridge.solve() for ridge in ridges]
    errors = [torch.zeros(2, dtype=torch.float64) for _ in ridges]
    totals = [torch.zeros(2, dtype=torch.float64) for _ in ridges]
    scored = False
    for x in val:
        scored = True
        for i, f in enumerate(token_maps(x) if predict else ()):
            tokens, places = _tokens(f)
            errors[i] += (predict[i](tokens) - places).square().sum(dim=0).cpu()
            totals[i] += places.square().sum(dim=0).cpu()  # the mean of a grid is 0
    if not (ridges and scored):
        raise ValueError('position_by_layer: train or val has no image.')
    return [_scores(e, t) for e, t in zip(errors, totals, strict=True)]


def _scores(error: Tensor, total: Tensor) -> dict[str, float]:
    column, row = (float(1 - e / t) if t else math.nan for e, t in zip(error, total, strict=True))
    both = float(1 - error.sum() / total.sum()) if total.all() else math.nan
    return dict(r2=both, row=row, column=column)


def pixels_as_map(images: Tensor, grid: Sequence[int]) -> Tensor | None:
    """The pixels of each token's patch as its features: what a place looks like, without a network.

    Args:
        images (Tensor): Shape (N, 3, H, W).
        grid (Sequence[int]): Rows and columns of tokens.

    Returns:
        Tensor: Shape (N, 3 p p, h, w) for patches of p x p pixels. None if they are not square, or
        of more than 32 pixels a side.
    """
    patch, rest = divmod(images.shape[-2], grid[0])
    if rest or (grid[0] * patch, grid[1] * patch) != tuple(images.shape[-2:]) or patch > 32:
        return None
    return F.pixel_unshuffle(images, patch)
