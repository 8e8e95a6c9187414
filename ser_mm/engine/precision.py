"""Mixed precision on CPUs, where MMEngine's own wrapper does not run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from ser_mm.arguments import Positive, checked


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

    cast_dtype = torch.bfloat16

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """What the forward pass runs in.

        Args:
            model (nn.Module): The model.
        """
        with super().optim_context(model), torch.autocast('cpu', self.cast_dtype):
            yield


@cache
def is_bfloat16_faster() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32.

    Both are tried, in milliseconds: of processors that name ``avx512_bf16`` some are slower in it,
    some faster. Of a training step matrix products are the part that can gain.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        tokens, weight = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
        times = []
        for _ in range(7):  # the best counts: others may be at work
            start = time.perf_counter()
            tokens @ weight
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    # By so much that neither noise nor another rank or a resumed run decides otherwise.
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
