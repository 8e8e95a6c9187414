import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, Positive, checked


class WeightNormLinear(nn.Module):
    """Linear layer without bias, each row of its weight given by a direction and a norm of 1.

    Args:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        fixed_norm (bool): Keep the norms at 1 instead of training them.
    """

    def __init__(self, in_channels: int, out_channels: int, fixed_norm: bool) -> None:
        super().__init__()
        # Drawn as the weight of a Linear layer; only its direction matters.
        self.direction = nn.Parameter(nn.Linear(in_channels, out_channels, bias=False).weight)
        self.norm = nn.Parameter(torch.ones(out_channels), requires_grad=not fixed_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels) to (N, out_channels)."""
        return F.linear(x, F.normalize(self.direction, dim=1) * self.norm[:, None])


@MODELS.register_module()
@checked
class DINONeck(BaseModule):
    """Projector of DINO (arXiv 2104.14294, Section 3.1 and Appendix C).

    A three-layer MLP with GELU ends in a bottleneck, whose l2-normalized output is compared with
    prototypes by a weight-normalized linear layer, ``last_layer``. There is no BatchNorm.

    Args:
        in_channels (int): Channels of the backbone's output.
        hid_channels (int): Width of the hidden layers. Defaults to 2048.
        bottleneck_channels (int): Width of the bottleneck. Defaults to 256.
        out_channels (int): Number of prototypes. Defaults to 65536.
        fixed_norm (bool): Keep the norm of each prototype at 1, which is more stable, instead of
            training it. Defaults to True.
        with_avg_pool (bool): Average the backbone's map (N, C, h, w) first. Defaults to False.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults to None: truncated
            normal of deviation 0.02 in the MLP.
    """

    def __init__(
        self,
        in_channels: Positive,
        hid_channels: Positive = 2048,
        bottleneck_channels: Positive = 256,
        out_channels: Positive = 65536,
        fixed_norm: bool = True,
        with_avg_pool: bool = False,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02, bias=0))
        self.with_avg_pool = with_avg_pool
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hid_channels),
            nn.GELU(),
            nn.Linear(hid_channels, hid_channels),
            nn.GELU(),
            nn.Linear(hid_channels, bottleneck_channels),
        )
        self.last_layer = WeightNormLinear(bottleneck_channels, out_channels, fixed_norm)

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Project embeddings.

        Args:
            x (tuple[Tensor]): Outputs of the backbone; the last is used, (N, in_channels), or
                (N, in_channels, h, w) with ``with_avg_pool``.

        Returns:
            tuple[Tensor]: Logits of the prototypes, (N, out_channels).
        """
        x = x[-1].mean(dim=(2, 3)) if self.with_avg_pool else x[-1]
        return (self.last_layer(F.normalize(self.mlp(x), dim=-1)),)
