"""The momentum update in a few operations for all parameters together."""

from collections.abc import Iterable
from typing import Annotated

import torch
from mmpretrain.models import CosineEMA
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import Positive, Share, between, checked


@MODELS.register_module()
@checked(momentum=Annotated[float, between(0, 1)], end_momentum=Share, interval=Positive)
class ForeachCosineEMA(CosineEMA):
    """MMPretrain's ``CosineEMA``, updated by foreach operations and without waiting for the device.

    ``CosineEMA`` launches two kernels per parameter and reads its count of updates from the device
    for each. The formula, its operations and their order are the same here, hence so are the
    numbers (on a GPU to rounding), and the state dicts load into either.

    Args:
        *args: Those of ``CosineEMA``: model, momentum, end_momentum, interval, device and
            update_buffers.
        **kwargs: Likewise.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._steps_on_host = self.steps.cpu().clone()  # need not be read from the device

    @torch.compiler.disable
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards a model; the first update makes it a copy.

        Args:
            model (nn.Module): The model whose parameters are averaged.
        """
        averages, sources = self._pairs(model)
        if self._steps_on_host == 0:
            _copy(averages, sources)
        elif self._steps_on_host % self.interval == 0:
            pairs = zip(averages, sources, strict=True)
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            averages, sources = map(list, zip(*floats, strict=True))
            weight = self._weight()
            torch._foreach_mul_(averages, 1 - weight)
            torch._foreach_add_(averages, sources, alpha=weight)
        if not self.update_buffers:
            _copy(self.module.buffers(), model.buffers())
        self.steps += 1
        self._steps_on_host += 1

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """What is averaged, and what it follows, on the same device."""
        averages, sources = (
            x.state_dict() if self.update_buffers else dict(x.named_parameters())
            for x in (self.module, model)
        )
        return list(averages.values()), [sources[k].to(x.device) for k, x in averages.items()]

    def _weight(self) -> float:
        """Weight of the model in this update: what ``avg_func`` makes of an average of 0 at 1."""
        average = torch.zeros((), dtype=torch.float64)
        self.avg_func(average, torch.ones_like(average), self._steps_on_host)
        return average.item()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps_on_host = self.steps.cpu().clone()


def use_foreach_update(model: nn.Module) -> None:
    """Replace each ``CosineEMA`` that is an attribute of a model by a :class:`ForeachCosineEMA`.

    MMPretrain's algorithms create theirs in code, not by config. Weights, schedule and keys stay
    as they are.

    Args:
        model (nn.Module): For instance MMPretrain's ``MoCoV3``; changed in place.
    """
    for name, ema in list(model.named_children()):
        if type(ema) is CosineEMA:
            faster = ForeachCosineEMA(
                ema.module,
                momentum=ema.momentum,
                end_momentum=ema.end_momentum,
                interval=ema.interval,
                device=ema.steps.device,
                update_buffers=ema.update_buffers,
            )
            faster.load_state_dict(ema.state_dict())
            setattr(model, name, faster.train(ema.training))


def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors, those of a type together, as foreach operations need."""
    by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        by_type.setdefault(target.dtype, []).append((target, source))
    for pairs in by_type.values():
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
