from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import MessageHub
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, ModuleCfg, NaturalFloat, checked
from ser_mm.models.heads.equivariance_head import EquivarianceHead
from ser_mm.models.heads.ser_head import SERHead
from ser_mm.models.two_view_wrapper import TwoViewWrapper
from ser_mm.views import ViewBatch


@MODELS.register_module()
@checked
class EquivarianceAlgorithm(TwoViewWrapper):
    """An equivariance objective on features, around a two-view SSL algorithm.

    The methods that SER was compared with: the wrapped algorithm computes its own loss, unchanged,
    and ``head`` one of the features of its two views. Where these are taken is up to the backbone:

    - without ``ser_layer`` they are its output, the original form of all four methods;
    - with ``ser_layer=k`` they are taken after block (or stage) k, through a LayerNorm: the [CLS]
      token if it is in by then (``cls_layer=0``), else the mean of the patch tokens. This is the
      layer-decoupled form (SER's paper, arXiv 2603.06693).

    What the wrapped algorithm and its backbone have to provide is described at
    :class:`~ser_mm.models.SERAlgorithm`; the backbone is a
    :class:`~ser_mm.models.SERVisionTransformer` or a :class:`~ser_mm.models.SERResNet`.

    Checkpoints have the keys of the wrapped algorithm beside ``equi_norm.`` and ``equi_head.``.

    Args:
        algorithm (dict): Config of the wrapped algorithm, e.g. MMPretrain's ``MoCoV3``.
        head (dict): Config of the method: :class:`~ser_mm.models.AugSelfHead`,
            :class:`~ser_mm.models.EquiModHead`, :class:`~ser_mm.models.STLHead` or
            :class:`~ser_mm.models.RotationHead`. Its ``in_channels`` defaults to the features'.
        loss_weight (float): Weight of the objective, 0 or more. At 0, the wrapped algorithm's
            losses, gradients and random numbers are those that it has on these views alone.
            Defaults to 1.0.
        data_preprocessor (dict, optional): As in :class:`~ser_mm.models.SERAlgorithm`. Defaults to
            None.
        init_cfg (dict, optional): Initialization config. Defaults to None.

    Raises:
        ValueError: At build, if the wrapped algorithm does not meet the contract, ``head`` is
            not an EquivarianceHead, as wide as no feature or in need of a momentum branch that
            there is not, or photometry on the device hides
            draws from a head that needs them; at the first batch, if it lacks the views or the
            record of draws that ``head`` needs.

    Example:
        >>> backbone = dict(type='SERVisionTransformer', arch='deit-small')
        >>> model = dict(type='EquivarianceAlgorithm', head=dict(type='AugSelfHead'),
        ...              algorithm=dict(algorithm, backbone=backbone))
    """

    loss_name = 'loss_equi'

    def __init__(
        self,
        algorithm: ModuleCfg,
        head: ModuleCfg,
        loss_weight: NaturalFloat = 1.0,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(algorithm, loss_weight, data_preprocessor, init_cfg, needs='feature')
        channels = self.backbone.feature_channels
        # The wrapped algorithm is initialized from the random state that it would have alone.
        with torch.random.fork_rng(devices=[]):
            inner = self.backbone.ser_layer is not None
            self.equi_norm = nn.LayerNorm(channels, eps=1e-6) if inner else nn.Identity()
            self.equi_head = _build_head(head, channels)
        if self.equi_head.in_channels != channels:
            raise ValueError(
                f'EquivarianceAlgorithm: head.in_channels={self.equi_head.in_channels}, but '
                f'features have {channels} channels; leave it out.'
            )
        kind = type(self.backbone)
        twins = [x for x in self.algorithm.modules() if type(x) is kind and x is not self.backbone]
        if self.equi_head.needs_momentum and not twins:
            raise ValueError(
                f"EquivarianceAlgorithm: head.other='momentum', but {algorithm['type']} has no "
                "momentum branch; set head.other='online', or leave it out."
            )
        hidden = self.equi_head.needs_draws or self.equi_head.needs_pairs
        on_device = [
            name for name in ('photometry', 'views') if getattr(self.data_preprocessor, name)
        ]
        if hidden and on_device:
            raise ValueError(
                f'EquivarianceAlgorithm: {type(self.equi_head).__name__} needs the draws of the '
                f'pipeline, and data_preprocessor.{on_device[0]} draws on the device; leave that '
                'out, and have all in the views of EquivariantViewPipeline.'
            )

    def _views_of_algorithm(self, inputs: list[ViewBatch]) -> list[ViewBatch]:
        """All but the extra views; features of the first two are asked for."""
        extra = self.equi_head.extra_views
        if len(inputs) < 2 + extra:
            raise ValueError(
                f'EquivarianceAlgorithm: views={len(inputs)} reach {type(self.equi_head).__name__},'
                f' which needs {extra} beyond those of the wrapped algorithm; give '
                'EquivariantViewPipeline extra_views, the pipeline of each.'
            )
        for view in inputs[:2]:
            view.wants_features = True
        return inputs[: len(inputs) - extra]

    def _objective(self, inputs: list[ViewBatch]) -> dict[str, Tensor]:
        head = self.equi_head
        views, extra = inputs[:2], inputs[len(inputs) - head.extra_views :]
        draws = [view.draws for view in views]
        if head.needs_draws and draws[0] is None:
            raise ValueError(
                f'EquivarianceAlgorithm: {type(head).__name__} needs what was drawn for the views; '
                'set record_draws=True in EquivariantViewPipeline.'
            )
        online, *momentum = (
            [self.equi_norm(view.features[branch]) for view in views]
            for branch in self._branches(views[0])[: 2 if head.needs_momentum else 1]
        )
        with _random_numbers_apart(inputs[0].base.device):
            embedded = [self.equi_norm(self.backbone.features(x)) for x in head.prepare(extra)]
        kept = [x.detach() for x in momentum[0]] if momentum else None
        return head.loss(online, draws if head.needs_draws else (), embedded, kept)

    def _branches(self, view: ViewBatch) -> list[nn.Module]:
        """The online backbone, and the momentum one if a view was handed to it."""
        return [self.backbone, *(x for x in view.features if x is not self.backbone)]


def _build_head(config: dict, channels: int) -> nn.Module:
    """The method, as wide at its input as the features."""
    kind = MODELS.get(config['type']) if isinstance(config['type'], str) else config['type']
    if isinstance(kind, type) and not issubclass(kind, EquivarianceHead):
        raise ValueError(
            f'EquivarianceAlgorithm: head.type={kind.__name__} has no objective on the features of '
            'two views; choose AugSelfHead, EquiModHead, STLHead, RotationHead or another '
            'EquivarianceHead'
            f'{", or SERAlgorithm around the algorithm" if kind is SERHead else ""}.'
        )
    return MODELS.build({'in_channels': channels, **config})


@contextmanager
def _random_numbers_apart(device: torch.device) -> Iterator[None]:
    """Drop path of extra views draws from a stream of its own, another one in every step."""
    devices = [device] if device.type == 'cuda' else []
    step = MessageHub.get_current_instance().get_info('iter', 0)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step * get_world_size() + get_rank())
        yield
