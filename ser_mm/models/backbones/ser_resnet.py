import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from mmpretrain.models.backbones import ResNet
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ser_mm.arguments import InitCfg, ModuleCfg, Natural, Positive, Share, at_least, checked, filled
from ser_mm.checkpoint import StrictPretrained
from ser_mm.views import ViewBatch


@MODELS.register_module()
@checked(
    in_channels=Positive,
    stem_channels=Positive,
    base_channels=Positive,
    expansion=Positive | None,
    num_stages=Positive,
    strides=Annotated[Sequence[Positive], filled],
    dilations=Annotated[Sequence[Positive], filled],
    out_indices=Annotated[Sequence[Natural], filled],
    frozen_stages=Annotated[int, at_least(-1)],
    style=Literal['pytorch', 'caffe'],
    conv_cfg=ModuleCfg | None,
    norm_cfg=ModuleCfg,
    drop_path_rate=Share,
)
class SERResNet(StrictPretrained, ResNet):
    """MMPretrain's ResNet with the feature map of a stage as the token map for SER.

    Called with images it is a ResNet like any other. Called with a
    :class:`~ser_mm.views.ViewBatch` it runs b1 and b2, of different sizes, in a pass each, and
    returns their embeddings, the averages of each output over its map. The map of b2 after stage
    ``ser_layer`` is left in the container.

    BatchNorm takes the statistics of each pass by itself, over all ranks where it is
    synchronised. The running statistics are those of b1. b2, a small share of the batch, is
    computed in float32 in mixed precision too, as synchronised BatchNorm asks for.

    Args:
        depth (int): 18, 34, 50, 101 or 152, see ``ResNet``.
        ser_layer (int, optional): Stage after which b2's token map is taken, 1 to the number of
            stages. Stage 3 has the stride of 16 pixels of a ViT/16. Defaults to None: no token
            map, an ordinary ResNet.
        init_cfg (dict | list[dict], optional): As None, that of ``ResNet``. ``dict(type=
            'Pretrained', checkpoint=..., prefix='backbone.')`` is strict: a parameter that is
            missing, unused or of another shape is an error. Defaults to None.
        **kwargs: Those of ``ResNet``.

    Raises:
        ValueError: If an argument is of another type, or ``ser_layer`` is outside the network or
            meets ``with_cp``.
    """

    def __init__(
        self,
        depth: Positive,
        *args,
        ser_layer: int | None = None,
        init_cfg: InitCfg = None,
        **kwargs,
    ) -> None:
        if init_cfg is not None:
            kwargs['init_cfg'] = init_cfg
        stages = kwargs.get('num_stages', 4)
        for name in ('strides', 'dilations'):
            if len(kwargs.get(name, range(stages))) != stages:
                raise ValueError(
                    f'SERResNet: {name}={kwargs[name]} has {len(kwargs[name])} values for '
                    f'num_stages={stages}; give one for each.'
                )
        super().__init__(depth, *args, **kwargs)
        if ser_layer is not None and not 1 <= ser_layer <= self.num_stages:
            raise ValueError(
                f'SERResNet: ser_layer={ser_layer} is outside the network; choose a stage from 1 '
                f'to {self.num_stages}.'
            )
        if self.with_cp and ser_layer is not None:
            # Blocks run for b1 and b2. Computed again in the backward pass, those of b2 would
            # change the running statistics, and DDP would see their parameters ready twice.
            raise ValueError(
                'SERResNet: with_cp=True cannot be used with ser_layer; leave one of them out.'
            )
        self.ser_layer = ser_layer

    @property
    def image_channels(self) -> int:
        """Channels of images."""
        return next(self.parameters()).shape[1]

    @property
    def token_map_channels(self) -> int | None:
        """Channels of the token map; None without ``ser_layer``."""
        if self.ser_layer is None:
            return None
        return getattr(self, self.res_layers[self.ser_layer - 1])[-1].out_channels

    @property
    def token_map_stride(self) -> int:
        """Pixels per token of the token map."""
        return 4 * math.prod(self.strides[: self.ser_layer])

    @property
    def feature_channels(self) -> int:
        """Channels of what :meth:`features` gives."""
        return self.token_map_channels or getattr(self, self.res_layers[-1])[-1].out_channels

    def forward(self, x: Tensor | ViewBatch) -> tuple[Tensor, ...]:
        """Embed images.

        Args:
            x (Tensor | ViewBatch): Images (N, 3, H, W), or b1 and b2.

        Returns:
            tuple[Tensor]: One output per ``out_indices``: maps (N, C, h, w), as ``ResNet`` gives;
            for a ViewBatch, embeddings (N1 + N2, C, 1, 1), of b1, then of b2.
        """
        if not isinstance(x, ViewBatch):
            return super().forward(x)
        # Without images too: ranks meet in every synchronised norm, so none leaves out a pass.
        with self._set_apart(len(x.base) == 0, x.base.device.type):
            base = self._stages(x.base)
        with self._set_apart(True, x.equi.device.type):
            equi = self._stages(x.equi)
        if self.ser_layer is not None:
            x.token_maps[self] = equi[self.ser_layer - 1]
        if x.wants_features:
            seen = (self.ser_layer or self.num_stages) - 1
            x.features[self] = torch.cat([maps[seen].mean(dim=(2, 3)) for maps in (base, equi)])
        return tuple(
            torch.cat([maps[i].mean(dim=(2, 3), keepdim=True) for maps in (base, equi)])
            for i in self.out_indices
        )

    def features(self, images: Tensor) -> Tensor:
        """What an equivariance objective sees of images: their mean over a stage's map.

        That of ``ser_layer``, or of the last stage. Running statistics stay as they are.

        Args:
            images (Tensor): (N, 3, H, W).

        Returns:
            Tensor: (N, C).
        """
        with self._keep_statistics():
            return self._stages(images, self.ser_layer)[-1].mean(dim=(2, 3))

    def _stages(self, images: Tensor, count: int | None = None) -> list[Tensor]:
        """The output map of every stage, or of the first ``count``."""
        x = self.stem(images) if self.deep_stem else self.relu(self.norm1(self.conv1(images)))
        x = self.maxpool(x)
        maps = []
        for name in self.res_layers[:count]:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps

    @contextmanager
    def _keep_statistics(self) -> Iterator[None]:
        """Leave the running statistics as they are: for batches that are empty on no rank.

        Unlike :meth:`_set_apart` it lets mixed precision be, as whole batches are most of a step.
        """
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
        uncounted = kept[0][2].clone() if kept else None
        try:
            for norm in norms:
                norm.momentum, norm.num_batches_tracked = 0.0, uncounted
            yield
        finally:
            for norm, momentum, count in kept:
                norm.momentum, norm.num_batches_tracked = momentum, count

    @contextmanager
    def _set_apart(self, apart: bool, device: str) -> Iterator[None]:
        """Leave the running statistics of BatchNorm as they are, and compute in float32.

        In float16 torch's synchronised BatchNorm refuses to go without running statistics, and a
        rank without images sends statistics of another type than those with images.
        """
        if not apart:
            yield
            return
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        try:
            for norm in norms:
                norm.track_running_stats = False
            with torch.autocast(device, enabled=False):
                yield
        finally:
            for norm in norms:
                norm.track_running_stats = True
