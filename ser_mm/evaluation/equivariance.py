"""How equivariant token maps are: R2 and retrieval, of one map or of every layer."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_mm import geometry
from ser_mm.evaluation.metrics import check_finite
from ser_mm.evaluation.results import make_table

TRANSFORMATIONS = ('rot90', 'rot180', 'flip_lr', 'flip_ud', 'scale', 'mixture')
"""Transformations that token maps are scored under. These are elements of D4, a resize to 1.3 times
the area, and both as drawn in training, an element for each image and a grid for each batch."""

TITLES = dict(r2='R2', retrieval='retrieval')
"""What the scores are called in tables and figures."""

_ELEMENTS = dict(rot90=1, rot180=2, flip_lr=4, flip_ud=6, scale=0)


class _Score:
    """Running sums of R2 and of token retrieval."""

    total: Tensor  # by channel, once there is a map

    def __init__(self) -> None:
        self.error = self.square = self.total = self.count = 0
        self.hits = self.images = 0

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Take moved maps and the maps of moved images, (N, C, h, w), both float64."""
        self.error += (predicted - target).square().sum()
        self.square += target.square().sum()
        self.total += target.sum(dim=(0, 2, 3))
        self.count += target.shape[0] * target.shape[2] * target.shape[3]

    def search(self, predicted: Tensor, target: Tensor) -> None:
        """Count the tokens of moved maps that are nearest to their counterpart in the target."""
        queries, keys = (F.normalize(x.flatten(2), dim=1) for x in (predicted, target))
        own = torch.arange(keys.shape[2], device=keys.device)
        for query, key in zip(queries, keys, strict=True):  # a large map squared is large
            self.hits += ((query.T @ key).argmax(dim=1) == own).sum()
        self.images += len(keys)

    def r2(self) -> float:
        variance = self.square - self.total.square().sum() / self.count
        return float(1 - self.error / variance) if variance > 1e-12 * self.square else math.nan


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
    score = _Score()
    for x, g in zip(
        images.split(batch_size), geometry.matrices(elements).split(batch_size), strict=True
    ):
        before = token_map(x)
        height, width = before.shape[-2:]
        size = grid or (height, width)
        pixels = size[0] * (x.shape[-2] // height), size[1] * (x.shape[-1] // width)
        after = token_map(geometry.act(x, g, pixels)).double()
        score.add(geometry.act(before.double(), g, size), after)
    return score.r2()


def check_transformations(transformations: Sequence[str]) -> None:
    """Check names of transformations.

    Raises:
        ValueError: If one is not in ``TRANSFORMATIONS``, or none is given.
    """
    unknown = sorted(set(transformations) - set(TRANSFORMATIONS))
    if unknown or not transformations:
        raise ValueError(
            f'transformations={list(transformations)}: choose one or more of '
            f'{", ".join(TRANSFORMATIONS)}.'
        )


@torch.no_grad()
def equivariance_by_layer(
    token_maps: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Tensor],
    transformations: Sequence[str] = TRANSFORMATIONS,
    seed: int = 0,
) -> dict[str, list[dict[str, float]]]:
    r"""Score the token maps of all layers at once, in one pass over the images.

    - ``r2``: how well moved maps predict the maps of moved images, see :func:`equivariance_score`.
    - ``retrieval``: share of the tokens of :math:`\rho_g F(x)` whose nearest token of
      :math:`F(g x)`, by cosine similarity, is the one at the same place.
    - ``chance``: what retrieval is by guessing, 1 / tokens.

    Neither depends on the scale of the features, and R2 not on a shift.

    Args:
        token_maps (Callable): Maps images (N, 3, H, W) to token maps (N, C, h, w), one per layer,
            for any H and W that are whole numbers of the largest token. A network has to be in
            eval mode, see :func:`~ser_mm.evaluation.token_maps_of`.
        batches (Iterable[Tensor]): Square images, (N, 3, H, H) each.
        transformations (Sequence[str]): Of ``TRANSFORMATIONS``, all by default. 'flip_lr'
            exchanges left and right. The grid of 'mixture' has 0.7 to 1.3 times the area and an
            aspect of 3 / 4 to 4 / 3.
        seed (int): Seed of 'mixture'. Defaults to 0.

    Returns:
        dict[str, list[dict[str, float]]]: For each transformation, the scores of each layer.

    Raises:
        ValueError: If a transformation is unknown, there is no image or one is not square, or a
            layer gives no map, or numbers that are not finite.
    """
    check_transformations(transformations)
    rng = torch.Generator().manual_seed(seed)
    scores: dict[str, list[_Score]] = {}
    for x in batches:
        if x.shape[-2] != x.shape[-1]:
            raise ValueError(
                f'equivariance_by_layer: images of {x.shape[-2]} x {x.shape[-1]} cannot be turned '
                'in their grid; use square ones.'
            )
        before = token_maps(x)
        odd = next((tuple(f.shape) for f in before if f.ndim != 4), None)
        if odd:
            raise ValueError(
                f'equivariance_by_layer: a layer gives {odd}, not a token map (N, C, h, w); use a '
                "network with maps, out_type='featmap' where it has an out_type."
            )
        check_finite(before)
        coarsest = min((tuple(f.shape[-2:]) for f in before), key=math.prod)
        for name in transformations:
            elements, grid = _draw(name, len(x), coarsest, rng)
            g = geometry.matrices(elements.to(x.device))
            sides = zip(grid, x.shape[-2:], coarsest, strict=True)
            after = token_maps(geometry.act(x, g, [n * (side // m) for n, side, m in sides]))
            own = scores.setdefault(name, [_Score() for _ in after])
            for score, f, target in zip(own, before, after, strict=True):
                predicted = geometry.act(f.double(), g, target.shape[-2:])
                score.add(predicted, target.double())
                score.search(predicted, target.double())
    if not scores:
        raise ValueError('equivariance_by_layer: batches has no image.')
    return {
        name: [
            dict(
                r2=score.r2(),
                retrieval=int(score.hits) / score.count,
                chance=score.images / score.count,
            )
            for score in own
        ]
        for name, own in scores.items()
    }


def _draw(
    name: str, count: int, grid: tuple[int, int], rng: torch.Generator
) -> tuple[Tensor, Sequence[int]]:
    """Elements (count,) of a batch, and the grid that it is resized to."""
    if name != 'mixture':
        elements = torch.full((count,), _ELEMENTS[name])
        if name == 'scale':  # 1.3 times the area, by one token at least
            grid = tuple(max(side + 1, round(side * math.sqrt(1.3))) for side in grid)
        return elements, grid
    moved_onto = geometry.draw_grid(grid, generator=rng)
    return torch.randint(geometry.NUM_ELEMENTS, (count,), generator=rng), moved_onto


def equivariance_curves(
    results: dict[str, dict[str, list[dict[str, float]]]],
) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Curves over the layers of several networks, and of what retrieval is by chance.

    Args:
        results (dict): By the name of a network, what :func:`equivariance_by_layer` returned for
            the same transformations.

    Returns:
        dict: Points (layer, score, 0) by network, by a title as 'R2, rot90', as
        :func:`~ser_mm.visualization.draw_curves` takes them.
    """
    # Chance depends on the number of tokens, which networks may differ in.
    distinct = {}
    for name, scores in results.items():
        distinct[str([[x['chance'] for x in layers] for layers in scores.values()])] = name
    chances = {
        'chance' if len(distinct) == 1 else f'chance, {name}': results[name]
        for name in distinct.values()
    }
    panels = {}
    for key, title in TITLES.items():
        for moves in next(iter(results.values())):
            curves = panels[f'{title}, {moves}'] = {}
            for name, scores in (results | (chances if key == 'retrieval' else {})).items():
                values = [layer['chance' if name in chances else key] for layer in scores[moves]]
                curves[name] = [(i + 1, value, 0.0) for i, value in enumerate(values)]
    return panels


def report_equivariance(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Tables of R2 and of retrieval in Markdown, a row per transformation and network.

    Args:
        results (dict): See :func:`equivariance_curves`.
    """
    rows = {title: [] for title in TITLES.values()}
    for panel, curves in equivariance_curves(results).items():
        title, _, moves = panel.partition(', ')
        for name, points in curves.items():
            rows[title].append([f'{moves}, {name}', *(value for _, value, _ in points)])
    tables = []
    for title, lines in rows.items():
        depth = max(map(len, lines)) - 1
        lines = [line + [''] * (depth + 1 - len(line)) for line in lines]
        header = [title, *(f'block {i + 1}' for i in range(depth))]
        tables.append(make_table(header, lines))
    return '\n\n'.join(tables)
