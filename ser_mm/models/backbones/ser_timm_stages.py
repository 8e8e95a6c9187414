from collections.abc import Sequence
from typing import Annotated, Literal

from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, Name, checked, filled
from ser_mm.views import ViewBatch

from .ser_resnet import SERResNet
from .ser_timm_vit import create_timm

# Parts of timm's networks by their classes: what runs first, the stages, and what pooled features
# pass at last.
_PARTS = {
    'ResNet': (
        ('conv1', 'bn1', 'act1', 'maxpool'),
        ('layer1', 'layer2', 'layer3', 'layer4'),
        None,
    ),
    'ConvNeXt': (('stem',), ('stages.0', 'stages.1', 'stages.2', 'stages.3'), 'head.norm'),
}


@MODELS.register_module()
@checked
class SERTimmStages(SERResNet):
    """A ResNet or ConvNeXt of timm, with the map of a stage as the token map for SER.

    It does what :class:`~ser_mm.models.SERResNet` does, b1 and b2 in a pass each, with the parts of
    a network of timm, whose parameters keep their names.

    Args:
        model (str): Name in timm, e.g. 'resnet50' or 'convnext_tiny', with or without a tag.
        ser_layer (int, optional): Stage after which b2's token map is taken, 1 to 4. Stage 3 has
            the stride of 16 pixels of a ViT/16. Defaults to None: no token map, an ordinary
            network.
        out_type (str): 'pooled', one embedding (N, C, 1, 1) as timm's network without its
            classifier gives it, or 'featmap', the maps of ``out_indices``, for images alone.
            Defaults to 'pooled'.
        out_indices (Sequence[int]): Stages whose maps are given, from 0. Defaults to (3,).
        model_args (dict, optional): Those of ``timm.create_model``, e.g.
            ``dict(drop_path_rate=0.1)``. Defaults to None.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained', checkpoint=FILE)`` loads
            timm's weights, strictly. Defaults to None: as timm initializes.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If an argument is of another type, timm has no such network, the network is of
            another kind, or a stage is outside of it.
    """

    def __init__(
        self,
        model: Name,
        ser_layer: int | None = None,
        out_type: Literal['pooled', 'featmap'] = 'pooled',
        out_indices: Annotated[Sequence[int], filled] = (3,),
        model_args: dict | None = None,
        init_cfg: InitCfg = None,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        network = create_timm('SERTimmStages', model, model_args)
        kind = type(network)
        if kind.__name__ not in _PARTS or kind.__module__.split('.')[0] != 'timm':
            raise ValueError(
                f"SERTimmStages: model='{model}' cannot be used, it is a {kind.__name__}; only "
                f'{" and ".join(_PARTS)} are known by their stages.'
            )
        unknown = _unknown_parts(network)
        if unknown:
            raise ValueError(
                f"SERTimmStages: model='{model}' cannot be used, it has {unknown} after its "
                'stages; choose one without, such as convnext_tiny.'
            )
        self._first, self.res_layers, self._last = _PARTS[kind.__name__]
        self.num_stages = len(self.res_layers)
        if ser_layer is not None and not 1 <= ser_layer <= self.num_stages:
            raise ValueError(
                f'SERTimmStages: ser_layer={ser_layer} is outside the network; choose a stage from '
                f'1 to {self.num_stages}.'
            )
        if not all(0 <= i < self.num_stages for i in out_indices):
            raise ValueError(
                f'SERTimmStages: out_indices={out_indices} is outside the network; choose '
                f'from 0 to {self.num_stages - 1}.'
            )
        if out_type == 'pooled' and tuple(out_indices) != (self.num_stages - 1,):
            raise ValueError(
                f"SERTimmStages: out_indices={out_indices} needs out_type='featmap'; "
                'pooled features are those of the last stage.'
            )
        if _pooling(network) != 'avg':
            raise ValueError(
                f"SERTimmStages: model='{model}' is pooled by '{_pooling(network)}', not 'avg'; "
                "set model_args=dict(global_pool='avg')."
            )
        self.model, self.model_args = model, dict(model_args or {})
        self.ser_layer, self.out_type, self.out_indices = ser_layer, out_type, tuple(out_indices)
        self._infos = network.feature_info[-self.num_stages :]
        for name, part in network.named_children():
            if any(True for _ in part.parameters()) or name in self._first:
                self.add_module(name, part)

    @property
    def token_map_channels(self) -> int | None:
        """Channels of the token map; None without ``ser_layer``."""
        return None if self.ser_layer is None else self._infos[self.ser_layer - 1]['num_chs']

    @property
    def token_map_stride(self) -> int:
        """Pixels per token of the token map."""
        return self._infos[(self.ser_layer or self.num_stages) - 1]['reduction']

    @property
    def feature_channels(self) -> int:
        """Channels of what ``features`` gives."""
        return self.token_map_channels or self._infos[-1]['num_chs']

    @property
    def trial_scale(self) -> int:
        """Factor on the grids of a trial, with which no stage is left without a pixel."""
        return self._infos[-1]['reduction'] // self.token_map_stride

    def train(self, mode: bool = True) -> 'SERTimmStages':
        """Set the mode."""
        return nn.Module.train(self, mode)

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``; without one timm has done it."""
        super().init_weights() if self.init_cfg else None

    def forward(self, x: Tensor | ViewBatch) -> tuple[Tensor, ...]:
        """Embed images.

        Args:
            x (Tensor | ViewBatch): Images (N, 3, H, W), or b1 and b2.

        Returns:
            tuple[Tensor]: One embedding, (N, C, 1, 1), for a ViewBatch of b1, then of b2; or the
            maps (N, C, h, w) of ``out_indices``.

        Raises:
            ValueError: If a ViewBatch meets ``out_type='featmap'``.
        """
        if not isinstance(x, ViewBatch):
            maps = self._stages(x)
            if self.out_type == 'featmap':
                return tuple(maps[i] for i in self.out_indices)
            return (self._pooled(maps[-1]),)
        if self.out_type == 'featmap':
            raise ValueError(
                "SERTimmStages: out_type='featmap' cannot hold b1 and b2, which differ in size; "
                "pretrain with 'pooled'."
            )
        return tuple(self._pooled(x) for x in super().forward(x))

    def _stages(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        x = images
        for name in self._first:
            x = getattr(self, name)(x)
        maps = []
        for name in self.res_layers[:count]:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def _pooled(self, x: Tensor) -> Tensor:
        """The embedding (N, C, 1, 1) of a map, or of its mean."""
        x = x.mean(dim=(2, 3), keepdim=True)
        return x if self._last is None else self.get_submodule(self._last)(x)


def _unknown_parts(network: nn.Module) -> str | None:
    """What a ConvNeXt of another make has after its stages; it would be left out."""
    if not isinstance(getattr(network, 'norm_pre', nn.Identity()), nn.Identity):
        return 'a norm before the pooling (head_norm_first)'
    head = getattr(network, 'head', None)
    if any(True for _ in getattr(head, 'pre_logits', nn.Identity()).parameters()):
        return 'a further layer in its head (head_hidden_size)'
    return None


def _pooling(network: nn.Module) -> str:
    pool = getattr(network, 'global_pool', None) or network.head.global_pool
    return pool.pool_type
