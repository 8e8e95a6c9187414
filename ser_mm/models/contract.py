"""A trial of what SERAlgorithm needs from the algorithm that it wraps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from numbers import Integral
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ser_mm.views import ViewBatch

GRIDS = (4, 3), (3, 5)
"""Tokens of b2 in the two views of a trial, by height and width."""
IMAGES = 2, 0
"""Images of b2 in the steps of a trial."""


def try_views(algorithm: nn.Module, owner: str = 'SERAlgorithm') -> None:
    """Compute the loss of two small views, and see what becomes of them; again without b2.

    It is done on a copy: weights, buffers, random state and message hub stay as they are.

    Args:
        algorithm (nn.Module): An algorithm with a ``backbone``. If that has no
            ``token_map_channels``, only what it is handed is checked.
        owner (str): What wraps it, for the message. Defaults to 'SERAlgorithm'.

    Raises:
        ValueError: If ``loss`` fails, does not hand each view to ``backbone`` once, hands them to
            more than one other backbone, or returns no dict of tensors with a loss to minimize; if
            embeddings are no tuple or too few, or a token map is missing, has another shape than
            it should, or carries no gradient. The message is one sentence.
    """
    for name in ('token_map_channels', 'token_map_stride'):
        number = getattr(algorithm.backbone, name, None)
        if number is not None and not (isinstance(number, Integral) and int(number) > 0):
            raise ValueError(
                f'{owner}: algorithm={type(algorithm).__name__} cannot be wrapped: {name} of the '
                f'backbone, {type(algorithm.backbone).__name__}, is {number!r}; set it to an '
                'integer of at least 1.'
            )
    trial = deepcopy(algorithm)
    trial.train()
    stride = getattr(trial.backbone, 'token_map_stride', 16)
    channels = getattr(trial.backbone, 'token_map_channels', None)
    taken = getattr(trial.backbone, 'image_channels', 3)
    # Networks whose later stages halve maps without padding need larger ones.
    scale = getattr(trial.backbone, 'trial_scale', 1)
    grids = [(height * scale, width * scale) for height, width in GRIDS]
    trained = any(p.requires_grad for p in trial.parameters())
    calls = []

    def take(module: nn.Module, args: tuple) -> None:
        given = args[0] if args else None
        if not isinstance(given, ViewBatch):
            kind = type(given).__name__
            raise TypeError(f'its loss gives `backbone` a {kind} instead of one whole view')
        calls.append(given)

    def count(module: nn.Module, args: tuple, out: Any) -> None:
        if not isinstance(out, (tuple, list)):
            raise TypeError(f'`backbone` returns a {type(out).__name__}, not a tuple of embeddings')
        if len(out[-1]) != len(args[0]):
            raise ValueError(f'{len(args[0])} images have {len(out[-1])} embeddings')

    trial.backbone.register_forward_pre_hook(take)
    trial.backbone.register_forward_hook(count)
    images = None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), _first_iteration():
            for images in IMAGES:
                views = [_view(stride, grid, images, scale, taken) for grid in grids]
                reported = trial.loss(views, [DataSample() for _ in range(len(views[0]))])
                if channels is not None:
                    for view, grid in zip(views, grids, strict=True):
                        times = sum(call is view for call in calls)
                        if times != 1:
                            raise ValueError(f'its loss gives a view to `backbone` {times} times')
                        _check_token_maps(view, trial.backbone, (images, channels, *grid))
                        carries = view.token_maps[trial.backbone].requires_grad
                        if images and trained and not carries:
                            raise ValueError(
                                'the token map of `backbone` carries no gradient, so that SER '
                                'would train nothing below it: do not detach it, and freeze no '
                                'stages up to it'
                            )
                _check_losses(reported, trial)
    except Exception as error:
        if channels is None and calls:
            return  # its use of the backbone is right, whatever a plain backbone makes of a view
        cause = _one_sentence(error)
        where = ' without images in b2' if images == 0 else ''
        raise ValueError(
            f'{owner}: algorithm={type(algorithm).__name__} cannot be wrapped: in a trial '
            f'step{where}, {cause}.'
        ) from error


def try_projector(neck: nn.Module, head: nn.Module, channels: int) -> None:
    """Compute the equivariance loss of two small token maps once, on copies.

    Args:
        neck (nn.Module): The projector, from a list of maps (N, C, h, w) to a list of as many
            maps (N, C', h, w).
        head (nn.Module): With ``loss(queries, keys)``, of two lists of such maps.
        channels (int): C.

    Raises:
        ValueError: If one of them fails or gives something else. The message is one sentence.
    """
    neck, head = deepcopy(neck), deepcopy(head)
    part, kind = 'neck', type(neck).__name__
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            maps = [torch.randn(2, channels, *grid) for grid in GRIDS]
            projected = neck(maps)
            shapes = [tuple(getattr(x, 'shape', ())) for x in projected]
            if [(2, *shape[2:]) for shape in shapes] != [(2, *grid) for grid in GRIDS]:
                raise ValueError(f'maps of 2 x {channels} x {GRIDS} become {shapes}')
            part, kind = 'head', type(head).__name__
            maps = [projected] * (3 if getattr(head, 'negatives', None) == 'both' else 2)
            loss = head.loss(*maps)
            if not isinstance(loss, Tensor) or loss.ndim:
                raise TypeError(f'its loss is not a tensor without dimensions but {loss!r}')
    except Exception as error:
        cause = _one_sentence(error)
        raise ValueError(
            f'SERAlgorithm: {part}.type={kind} does not do for a list of two token maps: in a '
            f'trial, {cause}; leave it out for SER{part.title()}.'
        ) from error


def _one_sentence(error: Exception) -> str:
    """What an error says first, to be part of a sentence."""
    return str(error).partition('\n')[0].rstrip('.').replace('. ', '; ') or type(error).__name__


class _Watched(Tensor):
    """A tensor that tells when it is used."""

    use: Callable[[], Any]

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args=(), kwargs=None) -> Any:
        for x in _flat(args):
            if isinstance(x, cls):
                x.use()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def _flat(args: Any) -> Iterator[Any]:
    for x in args:
        yield from _flat(x) if isinstance(x, (list, tuple)) else (x,)


def seen_views(inputs: list) -> tuple[list, set[int]]:
    """Views of which those beyond the first two tell when they are used.

    Args:
        inputs (list[ViewBatch | Tensor]): The views of a batch.

    Returns:
        tuple[list, set[int]]: The views, and the places of those that nobody has used so far.
    """
    # Those of another kind, as torch's fake tensors, cannot be watched.
    unseen = {i for i in range(2, len(inputs)) if type(inputs[i]) is Tensor}
    views = list(inputs)
    for i in unseen:
        views[i] = inputs[i].as_subclass(_Watched)
        views[i].use = partial(unseen.discard, i)
    return views, unseen


def _check_losses(reported: Any, algorithm: nn.Module) -> None:
    """Refuse what MMEngine cannot sum, or what no gradient comes from."""
    if not isinstance(reported, dict):
        raise TypeError(f'its loss returns a {type(reported).__name__}, not a dict of tensors')
    tensors = {
        key: list(value) if isinstance(value, (list, tuple)) else [value]
        for key, value in reported.items()
    }
    for key, values in tensors.items():
        for value in values:
            if not isinstance(value, Tensor):
                raise TypeError(f"its loss returns a {type(value).__name__} as '{key}', no tensor")
    losses = [value for key, values in tensors.items() if 'loss' in key for value in values]
    if not losses:
        raise ValueError(
            f"its loss returns {list(reported)}, none with 'loss' in its name, so that nothing is "
            'minimized'
        )
    trained = any(p.requires_grad for p in algorithm.parameters())
    if trained and not any(loss.requires_grad for loss in losses):
        raise ValueError(f'no gradient comes from {list(reported)}, which its loss returns')


def _view(stride: int, grid: tuple[int, int], images: int, scale: int, channels: int) -> ViewBatch:
    return ViewBatch(
        base=torch.randn(2, channels, 4 * scale * stride, 4 * scale * stride),
        equi=torch.randn(images, channels, *(side * stride for side in grid)),
        elements=torch.zeros(images, dtype=torch.int64),
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
