from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.arguments import ModuleCfg, Positive, checked
from ser_mm.models.heads.equivariance_head import EquivarianceHead, mlp

TURNS = 4


@MODELS.register_module()
@checked
class RotationHead(EquivarianceHead):
    """E-SSL's objective, the number of quarter turns of a crop (arXiv 2111.00899, Section 3).

    A further, small crop of each image is turned in all four ways; an MLP tells from its feature
    which. The mean cross entropy of all 4 N, of the online branch.

    Args:
        in_channels (int): Channels of the features.
        hid_channels (int): Channels before the last layer. The authors' code has 256 for SimSiam
            and Barlow Twins, 128 for SimCLR. Defaults to 256.
        norm_cfg (dict, optional): Norm between the layers. Defaults to None: ``dict(type='LN')``,
            theirs.

    Example:
        >>> head = RotationHead(in_channels=384)
        >>> images = head.prepare([torch.randn(2, 3, 96, 96)])  # [(8, 3, 96, 96)]
        >>> losses = head.loss([], extra=[torch.randn(8, 384)])
    """

    extra_views = 1

    def __init__(
        self, in_channels: Positive, hid_channels: Positive = 256, norm_cfg: ModuleCfg | None = None
    ) -> None:
        super().__init__(in_channels)
        norm_cfg = norm_cfg or dict(type='LN')
        self.classifier = mlp(*[in_channels] * 3, hid_channels, TURNS, norm_cfg=norm_cfg, bias=True)

    def prepare(self, extra: Sequence[Tensor]) -> list[Tensor]:
        """The crops (N, 3, H, H), unturned, then by one, two and three quarter turns.

        Raises:
            ValueError: If they are not square.
        """
        (crops,) = extra
        height, width = crops.shape[-2:]
        if height != width:
            raise ValueError(
                f'RotationHead: extra_views makes images of {height} x {width}; quarter turns need '
                'square ones, end it with a crop or resize to one number.'
            )
        return [torch.cat([torch.rot90(crops, k, (2, 3)) for k in range(TURNS)])]

    def loss(
        self,
        features: Sequence[Tensor],
        draws: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        momentum: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``loss``, ln 4 = 1.386 at chance, and ``rotation_accuracy``, 1/4 at chance."""
        (turned,) = extra
        logits = self.classifier(turned)
        label = torch.arange(TURNS, device=turned.device).repeat_interleave(len(turned) // TURNS)
        right = (logits.detach().argmax(dim=1) == label).to(torch.float32).mean()
        return dict(loss=F.cross_entropy(logits, label), rotation_accuracy=right)
