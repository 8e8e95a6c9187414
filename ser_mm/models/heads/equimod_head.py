from collections.abc import Sequence
from typing import Literal

import torch
from mmcv.cnn import build_norm_layer
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import ModuleCfg, Positive, PositiveFloat, checked
from ser_mm.draws import NUM_DRAWS
from ser_mm.models.heads.contrastive import LOSSES, gain
from ser_mm.models.heads.equivariance_head import EquivarianceHead, mlp, without_affine


@MODELS.register_module()
@checked
class EquiModHead(EquivarianceHead):
    """EquiMod's objective: predict a view's embedding from that of the image (arXiv 2211.01244).

    A further view, without augmentation, is embedded; from its embedding and from what was drawn
    for a view, a linear layer predicts the embedding of that view. Pairs of both are contrasted by
    NT-Xent, both views together, gradient through either side.

    Args:
        in_channels (int): Channels of the features.
        hid_channels (int): Channels inside the projector. SER's release has 384. Defaults to 2048,
            the authors'.
        out_channels (int): Channels of the embedding. Defaults to 128.
        temperature (float): Of the contrast. Defaults to 0.2.
        loss (str): 'nt_xent', the authors', or 'moco', that of SER's release: MoCo v3's in both
            directions, halved, whose gradient is about a sixth as large. Defaults to 'nt_xent'.
        norm_cfg (dict, optional): Norm of all layers. Defaults to None: ``dict(type='BN1d')``.

    The draws are standardized by the statistics of the batch, as a norm does, where the authors
    have constants of ImageNet and of one policy.

    Raises:
        ValueError: If an argument is of another type, or ``loss`` is unknown.
    """

    extra_views = 1
    needs_draws = True

    def __init__(
        self,
        in_channels: Positive,
        hid_channels: Positive = 2048,
        out_channels: Positive = 128,
        temperature: PositiveFloat = 0.2,
        loss: Literal['nt_xent', 'moco'] = 'nt_xent',
        norm_cfg: ModuleCfg | None = None,
    ) -> None:
        super().__init__(in_channels)
        norm_cfg = norm_cfg or dict(type='BN1d')
        plain = without_affine(norm_cfg)
        self.projector = mlp(
            in_channels,
            hid_channels,
            hid_channels,
            out_channels,
            norm_cfg=norm_cfg,
            last_norm=plain,
        )
        self.transformation = nn.Sequential(
            build_norm_layer(plain, NUM_DRAWS)[1],
            *mlp(NUM_DRAWS, out_channels, norm_cfg=norm_cfg, last_norm=norm_cfg),
        )
        self.predictor = mlp(2 * out_channels, out_channels, norm_cfg=norm_cfg, last_norm=plain)
        self.temperature = temperature
        self.loss_type = loss

    def loss(
        self,
        features: Sequence[Tensor],
        draws: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        momentum: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``loss``, and ``equimod_gain``: how much closer than that of the image, in cosine."""
        n = len(features[0])
        # All views together, so that the norms have one set of statistics, as the authors do.
        embedded = self.projector(torch.cat([*features, *extra]))
        views, image = embedded[: 2 * n], embedded[2 * n :].repeat(2, 1)
        moves = self.transformation(torch.cat([*draws]).to(image.dtype))
        predicted = self.predictor(torch.cat([image, moves], dim=1))
        loss = LOSSES[self.loss_type](views, predicted, self.temperature)
        if self.loss_type == 'moco':
            loss = loss / 2
        return dict(loss=loss, equimod_gain=gain(views, predicted, image))
