import torch
from mmengine.dist import get_world_size
from mmpretrain.models import LatentCrossCorrelationHead
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as all_reduce_with_grad


@MODELS.register_module()
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
                correlation = all_reduce_with_grad(correlation)
            return self.loss_module(correlation)
