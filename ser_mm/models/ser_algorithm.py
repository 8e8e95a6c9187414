import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from mmengine import dist
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm import geometry
from ser_mm.arguments import InitCfg, ModuleCfg, NaturalFloat, checked
from ser_mm.models.contract import try_projector
from ser_mm.models.heads.equivariance_head import EquivarianceHead
from ser_mm.models.two_view_wrapper import TwoViewWrapper
from ser_mm.views import ViewBatch


@MODELS.register_module()
@checked
class SERAlgorithm(TwoViewWrapper):
    """Soft Equivariance Regularization around a two-view SSL algorithm (arXiv 2603.06693).

    The wrapped algorithm computes its own loss, unchanged, from two containers that hold b1 and b2
    in place of its two views. SER adds, for b2, a loss on an intermediate token map: the map of
    one view, moved by the group element that relates the views, is to match the map of the other.

    What the wrapped algorithm has to provide:

    - ``backbone``, its online branch, which accepts a :class:`~ser_mm.views.ViewBatch`, returns a
      tuple whose last entry holds the embeddings of b1, then of b2, leaves the token map of b2 in
      ``ViewBatch.token_maps`` and tells ``token_map_channels`` and ``token_map_stride``, as
      :class:`~ser_mm.models.SERVisionTransformer` and :class:`~ser_mm.models.SERResNet` do. b2
      may be empty: on several ranks, a rank may have none of its images;
    - ``loss(inputs, data_samples)``, which hands each of the first two of ``inputs``, whole and
      by itself, to ``backbone`` once, and does nothing else with them. A second backbone that it
      hands them to, most often a moving average of the first, is the momentum branch. Further
      ``inputs`` are tensors, to do with as it likes, but it has to use them. It returns a dict of
      tensors, or of lists of them: what has 'loss' in its name is summed, the rest is logged.

    A trial step at build, on a copy and on images of a few tokens, shows whether it does. Where
    there is a process group it is left out, as it would need all ranks; a view that is used as a
    tensor then stops the first step of training with the same reason.

    A ``CosineEMA`` that it keeps is replaced by :class:`~ser_mm.models.ForeachCosineEMA`, which
    does the same in fewer operations.

    Checkpoints have the keys of the wrapped algorithm (``backbone.``, ``neck.``, ...) beside
    ``ser_neck.``, so that they load into either.

    Args:
        algorithm (dict): Config of the wrapped algorithm, e.g. MMPretrain's ``MoCoV3``.
        neck (dict, optional): Config of the projector of the token map. Its ``type`` defaults to
            :class:`~ser_mm.models.SERNeck`, its ``in_channels`` to those of the token map.
            Defaults to None.
        head (dict, optional): Config of the equivariance loss, its ``type`` by default
            :class:`~ser_mm.models.SERHead`. Defaults to None.
        loss_weight (float): Weight of the equivariance loss, 0 or more. Defaults to 1.0.
        detach_keys (bool): Stop the gradient to keys of the online branch, which provides them
            where there is no momentum branch. Keys of a momentum branch never carry gradient.
            Defaults to False.
        invariance (str): Whether the base loss is one of all images, 'together', as in the authors'
            release and the paper's Section 3; or the sum of one of b1 and one of b2, 'apart', as a
            summary of the paper writes it. The latter hands the wrapped algorithm's ``head`` the
            rows of b1, then those of b2, which several ranks must have in equal numbers. Defaults
            to 'together'.
        data_preprocessor (dict, optional): Config of the preprocessor; the Runner hands in its
            top-level ``data_preprocessor`` where the model has none. A ``SelfSupDataPreprocessor``,
            MMPretrain's, becomes a :class:`~ser_mm.models.SERDataPreprocessor`. What it leaves out
            is that of the wrapped algorithm (mean, std, channel order) and of its backbone
            (``patch_size``, the stride of the token map). Defaults to None.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: At build, if an argument is of another type, the wrapped algorithm does not
            meet the contract, or the neck, the head or the preprocessor do not fit.

    Example:
        >>> backbone = dict(type='SERVisionTransformer', arch='deit-small', ser_layer=3)
        >>> model = dict(type='SERAlgorithm', algorithm=dict(algorithm, backbone=backbone))
    """

    loss_name = 'loss_ser'

    def __init__(
        self,
        algorithm: ModuleCfg,
        neck: dict | None = None,
        head: dict | None = None,
        loss_weight: NaturalFloat = 1.0,
        detach_keys: bool = False,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: InitCfg = None,
        invariance: Literal['together', 'apart'] = 'together',
    ) -> None:
        super().__init__(algorithm, loss_weight, data_preprocessor, init_cfg, needs='token_map')
        # The wrapped algorithm is initialized from the random state that it would have alone.
        with torch.random.fork_rng(devices=[]):
            self.ser_neck = _build_neck(neck, self.backbone)
            self.ser_head = _build_head(head)
        if not dist.is_distributed():
            try_projector(self.ser_neck, self.ser_head, self.backbone.token_map_channels)
        self.detach_keys = detach_keys
        self.invariance = invariance

    def _report(self, inputs: list[ViewBatch], data_samples: Any) -> dict[str, Tensor]:
        """The losses of the wrapped algorithm, of all images or of b1 and of b2."""
        if self.invariance == 'together':
            return super()._report(inputs, data_samples)
        with _loss_of_parts(self.algorithm, len(inputs[0].base), len(inputs[0].equi)):
            return super()._report(inputs, data_samples)

    def _objective(self, inputs: list[ViewBatch]) -> dict[str, Tensor]:
        return dict(loss=self._equivariance_loss(inputs[:2]))

    def _equivariance_loss(self, views: list[ViewBatch]) -> Tensor:
        queries, keys = self._project(views)
        d_1, d_2 = (geometry.matrices(view.elements) for view in views)
        to_2 = geometry.compose(d_2, geometry.invert(d_1))
        size_1, size_2 = (q.shape[-2:] for q in queries)
        moved = [
            geometry.act(keys[1], geometry.invert(to_2), size_1),
            geometry.act(keys[0], to_2, size_2),
        ]
        if getattr(self.ser_head, 'negatives', 'other') == 'both':
            return self.ser_head.loss(queries, moved, keys)
        return self.ser_head.loss(queries, moved)

    def _project(self, views: list[ViewBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """Query and key maps of b2 per view, (N2, C', h, w) each."""
        online, *momentum = (
            [view.token_maps[branch] for view in views] for branch in self._branches(views[0])
        )
        queries = self.ser_neck(online)
        if not momentum:
            return queries, [q.detach() for q in queries] if self.detach_keys else queries
        with torch.no_grad():
            return queries, self.ser_neck(*momentum)

    def _branches(self, view: ViewBatch) -> list[nn.Module]:
        """The online backbone, and the momentum one if a view was handed to it."""
        return [self.backbone, *(x for x in view.token_maps if x is not self.backbone)]


@contextmanager
def _loss_of_parts(algorithm: nn.Module, n1: int, n2: int) -> Iterator[None]:
    """Let the head of an algorithm add the loss of its first n1 rows and that of the n2 others."""
    whole = algorithm.head.loss
    if dist.is_distributed() and len({int(n) for n in dist.all_gather(torch.tensor(n2))}) > 1:
        raise ValueError(
            "SERAlgorithm: invariance='apart' needs as many images of b2 on every rank; choose an "
            'equi_ratio that gives a multiple of the number of ranks in a global batch.'
        )

    def rows(x: Any, part: slice) -> Any:
        return x[part] if isinstance(x, Tensor) else [y[part] for y in x]

    def loss(*sides: Any) -> Tensor:
        parts = [(slice(n1), n1)] * (n1 > 0) + [(slice(n1, None), n2)] * (n2 > 0)
        # A moving average, as DINO's centre, is that of both parts and makes one step, not two.
        own = algorithm.head.buffers(recurse=False)
        averages = [_Average(x) for x in own if x.is_floating_point()]
        losses = []
        for part, count in parts:
            losses.append(whole(*(rows(side, part) for side in sides)))
            for average in averages:
                average.take(count / (n1 + n2))
        for average in averages:
            average.finish()
        return sum(losses)

    algorithm.head.loss = loss
    try:
        yield
    finally:
        del algorithm.head.loss


class _Average:
    """A buffer that each of several calls moves from where it was, and that becomes their mean."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.before = buffer, buffer.clone()
        self.total, self.version = torch.zeros_like(buffer), buffer._version
        self.changed = False

    def take(self, share: float) -> None:
        """What a call has made of it, and back to the start, if it was changed."""
        self.total.add_(self.buffer, alpha=share)
        if self.buffer._version != self.version:
            self.buffer.copy_(self.before)
            self.version = self.buffer._version
            self.changed = True

    def finish(self) -> None:
        if self.changed:
            self.buffer.copy_(self.total)


def _build_head(config: dict | None) -> nn.Module:
    """The equivariance loss of token maps."""
    config = dict(dict(type='SERHead'), **(config or {}))
    kind = MODELS.get(config['type']) if isinstance(config['type'], str) else config['type']
    if isinstance(kind, type) and issubclass(kind, EquivarianceHead):
        raise ValueError(
            f'SERAlgorithm: head.type={kind.__name__} has an objective on features, not on token '
            "maps; use type='EquivarianceAlgorithm' around the algorithm, or leave it out for "
            'SERHead.'
        )
    return MODELS.build(config)


def _build_neck(config: dict | None, backbone: nn.Module) -> nn.Module:
    """The projector, as wide at its input as the token map."""
    channels = backbone.token_map_channels
    config = dict(dict(type='SERNeck'), **(config or {}))
    kind = MODELS.get(config['type']) if isinstance(config['type'], str) else config['type']
    if kind is not None and 'in_channels' in inspect.signature(kind).parameters:
        config.setdefault('in_channels', channels)
    neck = MODELS.build(config)
    if getattr(neck, 'in_channels', channels) != channels:
        raise ValueError(
            f'SERAlgorithm: neck.in_channels={neck.in_channels}, but the token map has {channels} '
            f'channels; leave it out, or set neck.in_channels={channels}.'
        )
    return neck
