"""Correspondence: whether a token is found again in the same image under a known warp."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ser_mm.evaluation.warping import Warp, cell_centres, visible_cells, warp_images

_TIE = 1e-9
"""Cosine similarities, in float64, that differ by less are equal."""


class Pairs(NamedTuple):
    """Which tokens of an image can be found in the warped image, and where."""

    queries: Tensor
    """Tokens of the image that count, those whose place is in a key; booleans (T,)."""
    keys: Tensor
    """Tokens of the warped image that show nothing but the image; booleans (T,)."""
    near: Tensor
    """Whether a key is as near to the place of a query as it should; booleans (queries, keys)."""


def make_pairs(grid: Sequence[int], size: Sequence[int], warp: Warp, within: float = 1.0) -> Pairs:
    """What the geometry of a warp says of two token maps.

    Args:
        grid (Sequence[int]): Rows and columns of tokens, of both maps.
        size (Sequence[int]): Height and width of the image.
        warp (Warp): The warp.
        within (float): Distance in tokens up to which a match is right. Defaults to 1.0.

    Returns:
        Pairs: On the CPU.
    """
    centres = cell_centres(grid, size)
    rows, columns = grid
    token = torch.tensor([size[1] / columns, size[0] / rows], dtype=torch.float64)
    count = torch.tensor([columns, rows])
    keys = visible_cells(grid, size, warp)
    places = warp.move(centres, size) / token
    cells = (places + count / 2).floor().long()
    inside = ((cells >= 0) & (cells < count)).all(dim=1)
    x, y = cells.clamp(min=torch.zeros_like(count), max=count - 1).T
    queries = inside & keys[y * columns + x]
    distance = (places[queries][:, None] - (centres / token)[keys]).norm(dim=2)
    return Pairs(queries, keys, distance <= within + _TIE)


def count_matches(before: Tensor, after: Tensor, pairs: Pairs) -> float:
    """Tokens of an image whose nearest token of the warped image, by cosine, is a near one.

    Of keys that are equally near in features, each counts for its share, as if one was drawn.

    Args:
        before (Tensor): Token map of an image, (C, h, w).
        after (Tensor): That of a warped image, (C, h, w).
        pairs (Pairs): On the device of the maps.

    Returns:
        float: Between 0 and the number of queries.
    """
    queries, keys = (
        F.normalize(x.flatten(1)[:, chosen].double(), dim=0)
        for x, chosen in ((before, pairs.queries), (after, pairs.keys))
    )
    similarity = queries.T @ keys
    if not similarity.numel():
        return 0.0
    nearest = similarity >= similarity.amax(dim=1, keepdim=True) - _TIE
    return float(((nearest & pairs.near).sum(dim=1) / nearest.sum(dim=1).double()).sum())


class _Score:
    """Running counts of one layer under the warps of one name."""

    def __init__(self) -> None:
        self.found = self.asked = self.images = 0.0
        self.found_wrong = self.asked_wrong = 0.0
        self.chance = self.ceiling = 0.0

    def result(self) -> dict[str, float]:
        def share(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        return dict(
            matched=share(self.found, self.asked),
            wrong_image=share(self.found_wrong, self.asked_wrong),
            chance=share(self.chance, self.asked),
            ceiling=share(self.ceiling, self.asked),
            tokens=share(self.asked, self.images),
        )


@torch.no_grad()
def correspondence_by_layer(
    token_maps: Callable[[Tensor], Sequence[Tensor]],
    batches: Iterable[Tensor],
    warps: Mapping[str, Sequence[Warp]],
    within: float = 1.0,
) -> dict[str, list[dict[str, float]]]:
    """How often tokens are found again in the warped image, of all layers in one pass.

    A token of the image is matched to that token of the warped image which is nearest by cosine
    similarity. The match is right if the centre of the token found is at most ``within`` tokens
    from where the warp puts the centre of the token asked for. Tokens of the warped image that show
    what is beyond the border are left out, and tokens whose place is not in one of the others are
    not asked for.

    - ``matched``: share of the matches that are right.
    - ``wrong_image``: the same, of the tokens of the image before in the warped image. What is
      above ``chance`` here was found by its place, not by its content.
    - ``chance``: what drawing a token at random gives, from the geometry.
    - ``ceiling``: what the nearest centre gives, which is found where features are places. It is 1
      if ``within`` is at least 0.71, half of the diagonal of a token.
    - ``tokens``: tokens of an image that are asked for, on average.

    Nothing depends on the size of the batches.

    Args:
        token_maps (Callable): Maps images (N, 3, H, W) to token maps (N, C, h, w), one per layer. A
            network has to be in eval mode, see :func:`~ser_mm.evaluation.token_maps_of`.
        batches (Iterable[Tensor]): Images, (N, 3, H, W) each.
        warps (Mapping[str, Sequence[Warp]]): By a name, warps whose counts are put together.
        within (float): Distance in tokens. Defaults to 1.0.

    Returns:
        dict[str, list[dict[str, float]]]: For each name the scores of each layer; nan where no
        token is asked for, as in a map of one token that is turned by 45 degrees, and for
        ``wrong_image`` of a single image.

    Raises:
        ValueError: If there is no image.
    """
    scores: dict[str, list[_Score]] = {name: [] for name in warps}
    known: dict[tuple, Pairs] = {}
    previous: list[Tensor] | None = None
    for x in batches:
        before = [f.double() for f in token_maps(x)]
        for name, some in warps.items():
            scores[name] = scores[name] or [_Score() for _ in before]
            for warp in some:
                after = token_maps(warp_images(x, warp))
                for i, (score, f, g) in enumerate(zip(scores[name], before, after, strict=True)):
                    geometry = (warp, tuple(f.shape[-2:]), tuple(x.shape[-2:]))
                    if geometry not in known:
                        pairs = make_pairs(geometry[1], geometry[2], warp, within)
                        known[geometry] = Pairs(*(t.to(x.device) for t in pairs))
                    others = f[:-1] if previous is None else torch.cat([previous[i], f[:-1]])
                    _add(score, f, others, g, known[geometry])
        previous = [f[-1:] for f in before]
    if previous is None:
        raise ValueError('correspondence_by_layer: batches has no image.')
    return {name: [score.result() for score in own] for name, own in scores.items()}


def _add(score: _Score, before: Tensor, others: Tensor, after: Tensor, pairs: Pairs) -> None:
    """Count the matches of the images of a batch, and of the images before them."""
    asked = len(pairs.near)
    score.found += sum(count_matches(f, g, pairs) for f, g in zip(before, after, strict=True))
    score.asked += len(before) * asked
    score.images += len(before)
    last = after[len(after) - len(others) :]
    score.found_wrong += sum(count_matches(f, g, pairs) for f, g in zip(others, last, strict=True))
    score.asked_wrong += len(others) * asked
    if asked:
        score.chance += len(before) * float(pairs.near.double().mean(dim=1).sum())
        score.ceiling += len(before) * int(pairs.near.any(dim=1).sum())
