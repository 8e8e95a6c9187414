from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor

from ser_mm.arguments import Natural, Positive, PositiveFloat, Share, checked


@MODELS.register_module()
@checked
class DINOHead(BaseModule):
    r"""Loss of DINO: cross-entropy between teacher and student (arXiv 2104.14294, Section 3.1).

    For the logits :math:`t_i` of the teacher and :math:`s_j` of the student,

    .. math::
        L = -\frac{1}{|\{i \neq j\}|} \sum_{i \neq j}
            \mathrm{softmax}((t_i - c) / \tau_t) \cdot \log \mathrm{softmax}(s_j / \tau_s)

    averaged over images. The centre :math:`c` is the moving average of the mean of :math:`t_i`
    over images, views and ranks; the loss uses that of the steps before.

    The epoch, which :math:`\tau_t` depends on, is that of MMEngine's ``MessageHub``, and so right
    after a resume; without a Runner it is 0. In a loop by iteration,
    :class:`~ser_mm.engine.EpochSeedHook` has to tell how many iterations make an epoch.

    Args:
        out_channels (int): Number of prototypes. Defaults to 65536.
        student_temperature (float): :math:`\tau_s`. Defaults to 0.1.
        teacher_temperature (float): :math:`\tau_t` after the warm-up. Defaults to 0.07.
        warmup_teacher_temperature (float): :math:`\tau_t` in the first epoch.
            Defaults to 0.04.
        warmup_epochs (int): Epochs over which :math:`\tau_t` grows linearly; it is
            ``teacher_temperature`` in the last of them, as in DINO's release; 0 for no warm-up.
            Defaults to 10.
        center_momentum (float): Weight of the old centre in the moving average, 0 to 1. Defaults
            to 0.9.

    Raises:
        ValueError: If a temperature is not positive or ``center_momentum`` is outside [0, 1].

    Example:
        >>> head = DINOHead(out_channels=16)
        >>> teacher = [torch.randn(4, 16) for _ in range(2)]
        >>> student = [torch.randn(4, 16, requires_grad=True) for _ in range(5)]
        >>> loss = head.loss(student, teacher)
    """

    def __init__(
        self,
        out_channels: Positive = 65536,
        student_temperature: PositiveFloat = 0.1,
        teacher_temperature: PositiveFloat = 0.07,
        warmup_teacher_temperature: PositiveFloat = 0.04,
        warmup_epochs: Natural = 10,
        center_momentum: Share = 0.9,
    ) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.warmup_teacher_temperature = warmup_teacher_temperature
        self.warmup_epochs = warmup_epochs
        self.center_momentum = center_momentum
        self.register_buffer('center', torch.zeros(out_channels))

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Compute the loss of this rank, then update the centre.

        Args:
            student (Sequence[Tensor]): Logits of each view, (N, out_channels); first the views
                that the teacher saw, in its order.
            teacher (Sequence[Tensor]): Logits of each global view, (N, out_channels). No gradient
                flows to them.

        Returns:
            Tensor: Scalar.
        """
        teacher = [t.detach() for t in teacher]
        temperature = self.current_teacher_temperature()
        targets = [F.softmax((t - self.center) / temperature, dim=-1) for t in teacher]
        log_probs = [F.log_softmax(s / self.student_temperature, dim=-1) for s in student]
        terms = [
            -(target * log_prob).sum(dim=-1).mean()
            for i, target in enumerate(targets)
            for j, log_prob in enumerate(log_probs)
            if i != j
        ]
        self._update_center(torch.cat(teacher))
        return sum(terms) / len(terms)

    def current_teacher_temperature(self) -> float:
        """The teacher's temperature in the current epoch."""
        hub = MessageHub.get_current_instance()
        length = hub.get_info('epoch_length', None)  # of EpochSeedHook, for loops by iteration too
        epoch = hub.get_info('iter', 0) // length if length else hub.get_info('epoch', 0)
        share = min(epoch / max(self.warmup_epochs - 1, 1), 1) if self.warmup_epochs else 1
        start = self.warmup_teacher_temperature
        return start + share * (self.teacher_temperature - start)

    @torch.no_grad()
    def _update_center(self, teacher: Tensor) -> None:
        total = teacher.sum(dim=0, dtype=self.center.dtype)
        total_and_count = torch.cat([total, total.new_full((1,), len(teacher))])
        all_reduce(total_and_count)
        mean = total_and_count[:-1] / total_and_count[-1]
        self.center.lerp_(mean, 1 - self.center_momentum)
