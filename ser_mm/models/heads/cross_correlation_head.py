import torch
from mmengine.dist import all_reduce, get_world_size
from mmpretrain.models import LatentCrossCorrelationHead
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.arguments import InitCfg, ModuleCfg, Positive, checked


@MODELS.register_module()
@checked(in_channels=Positive, loss=ModuleCfg, init_cfg=InitCfg)
class CrossCorrelationHead(LatentCrossCorrelationHead):
    """Barlow Twins' loss (arXiv 2103.03230), the same however a batch is spread over ranks.

    In MMPretrain's head, no gradient passes between ranks, and the mean over ranks that DDP takes
    is that of one process divided by their number; beside a second loss, as in SER, it then loses
    weight with every rank. Here the gradient is that of one process. The matrix is computed in
    float32 in mixed precision too, where most squares of its entries underflow in float16.

    Args:
        in_channels (int): Number of input channels.
        loss (dict): Config of the loss of the matrix, e.g. MMPretrain's ``CrossCorrelationLoss``.
        init_cfg (dict | list[dict], optional): Initialization config. Defaults to None.
    """

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            input (Tensor): Embeddings of one view, (N, in_channels), N the same on all ranks.
            target (Tensor): Embeddings of the other, (N, in_channels).

        Returns:
            Tensor: Scalar, the same on all ranks.
        """
        with torch.autocast(input.device.type, enabled=False):
            view_1, view_2 = (self.bn(x.to(self.bn.running_mean.dtype)) for x in (input, target))
            correlation = view_1.T @ view_2 / (len(input) * get_world_size())
            if get_world_size() > 1:
                correlation = _SumOverRanks.apply(correlation)
            return self.loss_module(correlation)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, of which each goes on to the same loss.

    The gradient is then the same on all ranks, and need not be sent around to be summed.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * get_world_size()
