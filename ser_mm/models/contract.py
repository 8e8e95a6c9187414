"""A trial of what SERAlgorithm needs from the algorithm that it wraps."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmpretrain.structures import DataSample
from torch import nn

from ser_mm.views import ViewBatch

GRIDS = (4, 3), (3, 5)
"""Tokens of b2 in the two views of a trial, by height and width."""


def try_views(algorithm: nn.Module) -> None:
    """Compute the loss of two small views once, and see what becomes of them.

    It is done on a copy: weights, buffers, random state and message hub stay as they are.

    Args:
        algorithm (nn.Module): An algorithm with a ``backbone``. If that has no
            ``token_map_channels``, only what it is handed is checked.

    Raises:
        ValueError: If ``loss`` fails, does not hand each view to ``backbone`` once, or hands them
            to more than one other backbone; if embeddings are missing, or a token map is or has
            another shape than it should. The message is one sentence.
    """
    trial = deepcopy(algorithm)
    trial.train()
    stride = getattr(trial.backbone, 'token_map_stride', 16)
    channels = getattr(trial.backbone, 'token_map_channels', None)
    calls = []

    def take(module: nn.Module, args: tuple) -> None:
        given = args[0] if args else None
        if not isinstance(given, ViewBatch):
            kind = type(given).__name__
            raise TypeError(f'its loss gives `backbone` a {kind} instead of one whole view')
        calls.append(given)

    def count(module: nn.Module, args: tuple, out: Any) -> None:
        embeddings = out[-1] if isinstance(out, (tuple, list)) else out
        if len(embeddings) != len(args[0]):
            raise ValueError(f'{len(args[0])} images have {len(embeddings)} embeddings')

    trial.backbone.register_forward_pre_hook(take)
    trial.backbone.register_forward_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), _first_iteration():
            views = [_view(stride, grid) for grid in GRIDS]
            trial.loss(views, [DataSample() for _ in range(len(views[0]))])
            if channels is not None:
                for view, grid in zip(views, GRIDS, strict=True):
                    times = sum(call is view for call in calls)
                    if times != 1:
                        raise ValueError(f'its loss gives a view to `backbone` {times} times')
                    _check_token_maps(view, trial.backbone, (len(view.equi), channels, *grid))
    except Exception as error:
        if channels is None and calls:
            return  # its use of the backbone is right, whatever a plain backbone makes of a view
        cause = str(error).partition('\n')[0].rstrip('.')
        raise ValueError(
            f'SERAlgorithm: algorithm={type(algorithm).__name__} cannot be wrapped: in a trial '
            f'step, {cause or type(error).__name__}.'
        ) from error


def _view(stride: int, grid: tuple[int, int]) -> ViewBatch:
    return ViewBatch(
        base=torch.randn(2, 3, 4 * stride, 4 * stride),
        equi=torch.randn(2, 3, *(side * stride for side in grid)),
        elements=torch.zeros(2, dtype=torch.int64),
    )


def _check_token_maps(view: ViewBatch, backbone: nn.Module, shape: tuple) -> None:
    if backbone not in view.token_maps or len(view.token_maps) > 2:
        kinds = ', '.join(type(module).__name__ for module in view.token_maps) or 'no module'
        raise ValueError(
            f'{kinds} left a token map of a view, not `backbone` and at most one momentum branch'
        )
    for token_map in view.token_maps.values():
        if token_map.shape != shape:
            raise ValueError(
                f'a token map has the shape {tuple(token_map.shape)} instead of {shape}'
            )


@contextmanager
def _first_iteration() -> Iterator[None]:
    """Let schedules read what a Runner tells the message hub, and take it back."""
    info = MessageHub.get_current_instance().runtime_info
    before = dict(info)
    info.update(epoch=0, iter=0, max_epochs=1, max_iters=1)
    try:
        yield
    finally:
        info.clear()
        info.update(before)
