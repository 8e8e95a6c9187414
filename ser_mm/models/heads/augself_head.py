from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import ModuleCfg, Positive, PositiveFloat, Rule, checked, fits
from ser_mm.draws import places
from ser_mm.models.heads.equivariance_head import EquivarianceHead, mlp

CHANNELS = dict(crop=4, color=4, flip=1, blur=1, solarize=1)
"""Numbers that each label has."""

_LABELS = Rule(
    f'of positive weights by label, of {", ".join(CHANNELS)}',
    lambda x: x and all(k in CHANNELS and fits(v, PositiveFloat) for k, v in x.items()),
)


@MODELS.register_module()
@checked
class AugSelfHead(EquivarianceHead):
    r"""AugSelf's objective, the difference of two views' augmentations (arXiv 2111.09613).

    From the features of a view and of the other, an MLP per label :math:`a` predicts the difference
    of their draws, in both orders (Section 3.2 there):

    .. math:: L = \sum_a \lambda_a \, E \lVert \tanh \phi_a([y_1, y_2]) - d_a \rVert^2

    The mean is over images and channels. Labels: ``crop``, the centre's and the size's difference
    in shares of the image, mirrored with the view; ``color``, of brightness, contrast, saturation
    and hue in shares of their ranges; ``flip``, whether both or neither is mirrored, by binary
    cross entropy; ``blur``, of sigma in shares of its largest; ``solarize``. Nothing is contrasted.

    Args:
        in_channels (int): Channels of the features.
        weights (Mapping[str, float], optional): :math:`\lambda_a` of each label to predict.
            Defaults to None: 0.5 for ``crop`` and ``color``, the authors' for ImageNet100 and those
            of SER's release; theirs for STL10 are 1.
        hid_channels (int): Channels of the MLPs. Defaults to 512.
        other (str): The branch that gives the other view's feature: 'online', or 'momentum', as in
            the authors' code for MoCo alone. Defaults to 'online'.
        norm_cfg (dict, optional): Norm between the layers. Defaults to None: ``dict(type='BN1d')``.

    Raises:
        ValueError: If an argument is of another type, or a label is unknown.

    Example:
        >>> head = AugSelfHead(in_channels=384, weights=dict(crop=0.5, color=0.5))
        >>> features, draws = torch.randn(2, 8, 384), torch.rand(2, 8, 18)
        >>> losses = head.loss(features, draws)
    """

    needs_draws = True

    def __init__(
        self,
        in_channels: Positive,
        weights: Annotated[Mapping, _LABELS] | None = None,
        hid_channels: Positive = 512,
        other: Literal['online', 'momentum'] = 'online',
        norm_cfg: ModuleCfg | None = None,
    ) -> None:
        super().__init__(in_channels)
        weights = dict(crop=0.5, color=0.5) if weights is None else dict(weights)
        self.weights = weights
        self.other = other
        self.needs_momentum = other == 'momentum'
        self.predictors = nn.ModuleDict(
            {
                name: mlp(
                    2 * in_channels,
                    hid_channels,
                    hid_channels,
                    CHANNELS[name],
                    norm_cfg=norm_cfg or dict(type='BN1d'),
                    last_bias=True,
                )
                for name in weights
            }
        )

    def loss(
        self,
        features: Sequence[Tensor],
        draws: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        momentum: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """``loss``, and per label ``<label>_error``, a share of the error of predicting nothing."""
        y_1, y_2 = features
        others = (y_1, y_2)
        if self.other == 'momentum':
            if momentum is None:
                raise ValueError(
                    "AugSelfHead: other='momentum', but the wrapped algorithm has no momentum "
                    "branch; set other='online'."
                )
            others = tuple(momentum)
        pairs = torch.cat([torch.cat([y_1, others[1]], dim=1), torch.cat([y_2, others[0]], dim=1)])
        labels = differences(*draws)
        backward = differences(*draws[::-1])
        total = torch.zeros((), device=pairs.device)
        figures = {}
        for name, weight in self.weights.items():
            predicted = self.predictors[name](pairs)
            predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            label = torch.cat([labels[name], backward[name]]).to(predicted.dtype)
            if name == 'flip':
                error = F.binary_cross_entropy_with_logits(predicted, label)
                nothing = F.binary_cross_entropy_with_logits(torch.zeros_like(label), label)
            else:
                error = F.mse_loss(predicted.tanh(), label)
                nothing = label.square().mean()
            total = total + weight * error
            figures[f'{name}_error'] = error.detach() / nothing.clamp(min=1e-12)
        return dict(loss=total, **figures)


def differences(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Labels of an ordered pair of views.

    Args:
        first (Tensor): What was drawn for one view, (N, 18).
        second (Tensor): What was drawn for the other, (N, 18).

    Returns:
        dict[str, Tensor]: By label, (N, channels); 0 where draws are equal, but for ``flip``, which
        is 1 there.
    """
    crops = [_centre_and_size(x) for x in (first, second)]
    by_column = first - second
    flip = by_column[:, places('flip')]
    return dict(
        crop=crops[0] - crops[1],
        color=by_column[:, places('brightness', 'contrast', 'saturation', 'hue')],
        flip=1 - flip.abs(),
        blur=by_column[:, places('sigma')],
        solarize=-by_column[:, places('solarize')],
    )


def _centre_and_size(draws: Tensor) -> Tensor:
    """Centre (y, x) and size (h, w) of a crop, the centre mirrored where the view is: (N, 4)."""
    top, left, height, width, flip = draws[:, places('top', 'left', 'height', 'width', 'flip')].t()
    x = left + width / 2
    x = x + flip * (1 - 2 * x)
    return torch.stack([top + height / 2, x, height, width], dim=1)
