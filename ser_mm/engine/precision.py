"""Mixed precision on CPUs, where MMEngine's own wrapper does not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ser_mm.arguments import Positive, checked

_CPU_INFO = Path('/proc/cpuinfo')
# x86: matrix tiles, or dot products in vectors. Without either, torch emulates bfloat16.
_FLAGS = {'amx_bf16', 'avx512_bf16'}


@OPTIM_WRAPPERS.register_module()
@checked(accumulative_counts=Positive)
class CPUAmpOptimWrapper(OptimWrapper):
    """Trains in bfloat16 on a CPU: the forward pass under autocast, float32 weights and optimizer.

    bfloat16 has the range of float32, so losses need no scale, and checkpoints are those of
    ``OptimWrapper``. It stands in for ``AmpOptimWrapper(dtype='bfloat16')``, which refuses CPUs,
    see :func:`~ser_mm.engine.cpu.adapt_to_device`.

    Args:
        **kwargs: Those of ``OptimWrapper``: optimizer, accumulative_counts and clip_grad.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """What the forward pass runs in.

        Args:
            model (nn.Module): The model.
        """
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def has_bfloat16() -> bool:
    """Whether the CPU multiplies in bfloat16 itself, by what Linux says of it."""
    if not _CPU_INFO.is_file():
        return False
    return not _FLAGS.isdisjoint(_CPU_INFO.read_text().split())
