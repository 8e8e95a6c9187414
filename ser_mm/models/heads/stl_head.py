from collections.abc import Sequence
from typing import Literal

import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import ModuleCfg, NaturalFloat, Positive, PositiveFloat, checked
from ser_mm.models.heads.contrastive import LOSSES, gain
from ser_mm.models.heads.equivariance_head import EquivarianceHead, mlp


@MODELS.register_module()
@checked
class STLHead(EquivarianceHead):
    r"""STL's objectives, one image moved as another was (arXiv 2501.08712).

    Images 2i and 2i + 1 share their draws of crop, jitter and grayscale in each view. A network
    encodes the move between two views, :math:`t = f_T([y_1, y_2])`; the partner's code gives a
    matrix :math:`W(t)` that is to move one view's feature to the other's (Section 3):

    .. math:: L = \lambda_{equi} L_{equi} + \lambda_{trans} L_{trans}

    :math:`L_{equi}` contrasts projections of features with those of the moved features,
    :math:`L_{trans}` codes of images with those of their partners, by NT-Xent.

    Args:
        in_channels (int): Channels D of the features. The matrices take 128 D^2 weights.
        code_channels (int): Channels of the code. Defaults to 128.
        hid_channels (int): Channels inside the projector of features. Defaults to 512.
        out_channels (int): Channels of projections. Defaults to 128.
        equi_weight (float): :math:`\lambda_{equi}`, 0 or more. Defaults to 1.
        trans_weight (float): :math:`\lambda_{trans}`, 0 or more: 0.1 in the authors' code and in
            SER's release, 0.2 in their paper. Defaults to 0.1.
        temperature (float): Of the contrasts. Defaults to 0.2.
        loss (str): 'nt_xent', the authors', or 'moco', that of SER's release: MoCo v3's in both
            directions. Defaults to 'nt_xent'.
        norm_cfg (dict, optional): Norm between layers. Defaults to None: ``dict(type='BN1d')``.

    Raises:
        ValueError: If an argument is of another type, or ``loss`` is unknown.
    """

    needs_pairs = True

    def __init__(
        self,
        in_channels: Positive,
        code_channels: Positive = 128,
        hid_channels: Positive = 512,
        out_channels: Positive = 128,
        equi_weight: NaturalFloat = 1.0,
        trans_weight: NaturalFloat = 0.1,
        temperature: PositiveFloat = 0.2,
        loss: Literal['nt_xent', 'moco'] = 'nt_xent',
        norm_cfg: ModuleCfg | None = None,
    ) -> None:
        super().__init__(in_channels)
        norm_cfg = norm_cfg or dict(type='BN1d')
        self.encoder = mlp(2 * in_channels, code_channels, code_channels, norm_cfg=norm_cfg)
        self.matrix = nn.Linear(code_channels, in_channels**2, bias=False)
        self.projector = mlp(in_channels, hid_channels, out_channels, norm_cfg=norm_cfg)
        self.code_projector = mlp(code_channels, code_channels, out_channels, norm_cfg=norm_cfg)
        self.equi_weight = equi_weight
        self.trans_weight = trans_weight
        self.temperature = temperature
        self.loss_type = loss

    def loss(
        self,
        features: Sequence[Tensor],
        draws: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        momentum: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``loss``, and ``stl_gain``: how much closer than the other view's feature, in cosine.

        Raises:
            ValueError: If the batch has no pairs.
        """
        y_1, y_2 = features
        if len(y_1) % 2:
            raise ValueError(
                f'STLHead: a batch of {len(y_1)} images is not made of pairs; choose an even '
                'batch_size, and drop_last=True.'
            )
        contrast = LOSSES[self.loss_type]
        codes = [self.encoder(torch.cat(pair, dim=1)) for pair in ((y_1, y_2), (y_2, y_1))]
        codes_12, codes_21 = (code.unflatten(0, (-1, 2)) for code in codes)
        moved = [
            self._move(y_2, codes_21.flip(1).flatten(0, 1)),
            self._move(y_1, codes_12.flip(1).flatten(0, 1)),
        ]
        # One pass of each norm per view, as in the authors' code.
        views, predicted = (
            torch.cat([self.projector(x) for x in pair]) for pair in ((y_1, y_2), moved)
        )
        even, odd = (
            self.code_projector(torch.cat([codes_12[:, i], codes_21[:, i]])) for i in range(2)
        )
        loss = self.equi_weight * contrast(views, predicted, self.temperature)
        loss = loss + self.trans_weight * contrast(even, odd, self.temperature)
        others = torch.cat(views.chunk(2)[::-1])
        return dict(loss=loss, stl_gain=gain(views, predicted, others))

    def _move(self, features: Tensor, codes: Tensor) -> Tensor:
        """W(t) y, (N, D), without holding N matrices: linear in the products of y and t."""
        products = (features.unsqueeze(2) * codes.unsqueeze(1)).flatten(1)
        return nn.functional.linear(products, self.matrix.weight.view(features.shape[1], -1))
