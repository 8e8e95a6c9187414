"""What the heads of EquivarianceAlgorithm have in common."""

from collections.abc import Sequence

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn


class EquivarianceHead(BaseModule):
    """An equivariance objective on the features of an image's views.

    Attributes:
        extra_views (int): Views, the last of a batch, that this objective alone sees.
        needs_draws (bool): Whether it reads what was drawn for the views, see :mod:`ser_mm.draws`.
        needs_momentum (bool): Whether it reads features of the momentum branch.
        needs_pairs (bool): Whether images 2i and 2i + 1 of a batch have to share their draws.

    Args:
        in_channels (int): Channels of the features.
    """

    extra_views = 0
    needs_draws = False
    needs_momentum = False
    needs_pairs = False

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels

    def prepare(self, extra: Sequence[Tensor]) -> list[Tensor]:
        """What to embed of the extra views, (N, 3, H, W) each."""
        return list(extra)

    def loss(
        self,
        features: Sequence[Tensor],
        draws: Sequence[Tensor] = (),
        extra: Sequence[Tensor] = (),
        momentum: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The objective of this rank's images.

        Args:
            features (Sequence[Tensor]): Of the two views, (N, in_channels) each.
            draws (Sequence[Tensor]): What was drawn for each, (N, 18), if needed.
            extra (Sequence[Tensor]): Features of what :meth:`prepare` returned.
            momentum (Sequence[Tensor], optional): Features of the two views by the momentum
                branch, where there is one; without gradient.

        Returns:
            dict[str, Tensor]: ``loss``, and figures that tell whether it learns.
        """
        raise NotImplementedError


def mlp(
    *widths: int,
    norm_cfg: dict,
    bias: bool = False,
    last_bias: bool | None = None,
    last_norm: dict | None = None,
) -> nn.Sequential:
    """Linear layers with a norm and ReLU in between, initialized as torch does.

    Args:
        *widths (int): Channels, from the input to the output.
        norm_cfg (dict): Norm between the layers.
        bias (bool): Whether the layers have one. Defaults to False.
        last_bias (bool, optional): Whether the last has one. Defaults to None: as the others.
        last_norm (dict, optional): Norm behind the last layer. Defaults to None: none.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        with_bias = bias if i < last or last_bias is None else last_bias
        layers.append(nn.Linear(n_in, n_out, bias=with_bias))
        if i < last:
            layers += [build_norm_layer(norm_cfg, n_out)[1], nn.ReLU(inplace=True)]
        elif last_norm is not None:
            layers.append(build_norm_layer(last_norm, n_out)[1])
    return nn.Sequential(*layers)


def without_affine(norm_cfg: dict) -> dict:
    """A norm that only standardizes, without weight and bias."""
    name = 'elementwise_affine' if norm_cfg['type'] == 'LN' else 'affine'
    return {**norm_cfg, name: False}
