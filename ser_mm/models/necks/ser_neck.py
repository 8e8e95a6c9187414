from typing import Optional

from mmengine.model import BaseModule
from mmpretrain.models.utils import build_norm_layer
from mmpretrain.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class SERNeck(BaseModule):
    """Projector of the token map, the same for every token and for both branches.

    LayerNorm over channels, 1x1 convolution, GELU, 1x1 convolution; the convolutions have no bias
    (paper, Section 3). The LayerNorm belongs to the loss, not to the network that is kept, hence
    it lives here and not in the backbone: a pretrained backbone has no parameter of SER's.

    Args:
        in_channels (int): Channels of the token map.
        hid_channels (int): Channels between the two convolutions. Defaults to 512.
        out_channels (int): Channels of the projected map. Defaults to 512.
        norm_cfg (dict): Norm over the channels of each token.
            Defaults to ``dict(type='LN2d', eps=1e-6)``.
        init_cfg (dict, optional): Initialization config. Defaults to None.
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int = 512,
        out_channels: int = 512,
        norm_cfg: dict = dict(type='LN2d', eps=1e-6),  # noqa: B006
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = in_channels
        self.norm = build_norm_layer(norm_cfg, in_channels)
        self.fc1 = nn.Conv2d(in_channels, hid_channels, kernel_size=1, bias=False)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hid_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, token_map: Tensor) -> Tensor:
        """Project a token map.

        Args:
            token_map (Tensor): Shape (N, in_channels, h, w); N may be 0.

        Returns:
            Tensor: Shape (N, out_channels, h, w).
        """
        return self.fc2(self.act(self.fc1(self.norm(token_map))))
