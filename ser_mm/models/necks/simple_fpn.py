from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.models.utils import build_norm_layer
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, ModuleCfg, Positive, PositiveFloat, Rule, checked, filled

_falling = Rule('from the largest down', lambda x: all(a > b for a, b in pairwise(x)))


@MODELS.register_module()
@checked
class SimpleFPN(BaseModule):
    """ViTDet's simple feature pyramid (arXiv 2203.16527): every level from the last map alone.

    A map of stride s is brought to stride s / scale for each of ``scale_factors``: by two
    transposed convolutions (4), by one (2), left as it is (1), or by max pooling (0.5). A 1x1 and a
    3x3 convolution, each with a norm, follow. Further levels, up to ``num_outs``, take every
    second place of the level before.

    Args:
        in_channels (int): Channels of the map.
        out_channels (int): Channels of all levels. Defaults to 256.
        scale_factors (Sequence[float]): Some of 4, 2, 1 and 0.5, finest level first.
            Defaults to (4, 2, 1, 0.5): strides 4, 8, 16 and 32 from a patch of 16.
        num_outs (int, optional): Number of levels. Defaults to None: those of ``scale_factors``.
        norm_cfg (dict): Norm after each convolution and between the transposed ones.
            Defaults to ``dict(type='LN2d', eps=1e-6)``.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults to None: that of
            the layers in PyTorch.

    Raises:
        ValueError: If an argument is of another type, a scale is not one of the four, or
            ``num_outs`` is less than the number of scales.
    """

    def __init__(
        self,
        in_channels: Positive,
        out_channels: Positive = 256,
        scale_factors: Annotated[Sequence[PositiveFloat], filled, _falling] = (4, 2, 1, 0.5),
        num_outs: Positive | None = None,
        norm_cfg: ModuleCfg = dict(type='LN2d', eps=1e-6),  # noqa: B006
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(init_cfg)
        if not set(scale_factors) <= {4, 2, 1, 0.5}:
            raise ValueError(
                f'SimpleFPN: scale_factors={tuple(scale_factors)}; choose from 4, 2, 1 and 0.5.'
            )
        self.num_outs = len(scale_factors) if num_outs is None else num_outs
        if self.num_outs < len(scale_factors):
            raise ValueError(
                f'SimpleFPN: num_outs={num_outs} is less than the {len(scale_factors)} levels of '
                'scale_factors; raise it or give fewer.'
            )
        self.levels = nn.ModuleList()
        for scale in scale_factors:
            layers, channels = _rescale(in_channels, scale, norm_cfg)
            for kernel in (1, 3):
                layers += [
                    nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False),
                    build_norm_layer(norm_cfg, out_channels),
                ]
                channels = out_channels
            self.levels.append(nn.Sequential(*layers))

    def forward(self, inputs: tuple[Tensor]) -> tuple[Tensor, ...]:
        """Make the pyramid.

        Args:
            inputs (tuple[Tensor]): One map, shape (N, in_channels, h, w).

        Returns:
            tuple[Tensor]: ``num_outs`` levels, shape (N, out_channels, scale * h, scale * w) each.
        """
        (x,) = inputs
        outs = [level(x) for level in self.levels]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _rescale(channels: int, scale: float, norm_cfg: dict) -> tuple[list[nn.Module], int]:
    """Layers that rescale a map, and the channels that they give."""
    if scale == 4:
        return [
            nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2),
            build_norm_layer(norm_cfg, channels // 2),
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2),
        ], channels // 4
    if scale == 2:
        half = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        return [half], channels // 2
    return [nn.MaxPool2d(kernel_size=2, stride=2)] if scale == 0.5 else [], channels
