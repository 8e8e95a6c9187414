from collections.abc import Sequence

from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, Positive, checked
from ser_mm.views import pack_maps, unpack_maps


@MODELS.register_module()
@checked
class SERNeck(BaseModule):
    """Projector of token maps, the same for every token and for both branches.

    LayerNorm over channels, linear, GELU, linear, token by token, which is to say 1x1 convolutions
    of the map; the linear layers have no bias (paper, Section 3). The LayerNorm serves the loss
    alone, hence it lives here and not in the backbone, which has no parameter of SER's.

    Args:
        in_channels (int): Channels of the token map.
        hid_channels (int): Channels between the two linear layers. Defaults to 512.
        out_channels (int): Channels of the projected map. Defaults to 512.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    def __init__(
        self,
        in_channels: Positive,
        hid_channels: Positive = 512,
        out_channels: Positive = 512,
        init_cfg: InitCfg = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.layers = nn.Sequential(
            nn.LayerNorm(in_channels, eps=1e-6),
            nn.Linear(in_channels, hid_channels, bias=False),
            nn.GELU(),
            nn.Linear(hid_channels, out_channels, bias=False),
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Project token maps of any sizes in one pass.

        Args:
            maps (Sequence[Tensor]): Shape (N_i, in_channels, h_i, w_i) each; N_i may be 0.

        Returns:
            list[Tensor]: Shape (N_i, out_channels, h_i, w_i) each.
        """
        return unpack_maps(self.layers(pack_maps(maps)), maps)
