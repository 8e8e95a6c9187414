"""Compiled backbones in a run."""

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.registry import HOOKS
from torch import nn

from ser_mm.arguments import Name, checked

# Of blocks with and without drop path, with and without gradient, with none, one or more images in
# b2, there are 12.
GRAPHS = 16


@HOOKS.register_module()
@checked
class CompileHook(Hook):
    """Compile the backbones before training, the momentum branch's included.

    Of a :class:`~ser_mm.models.SERVisionTransformer` the inside of a block is compiled, once for
    all blocks and for all sizes of b2; of MMPretrain's backbones the forward pass. Modules are
    compiled in place: checkpoints keep their keys, and can be resumed with and without.

    MMEngine's ``compile`` is the whole ``train_step``, with the optimizer and the log in it.

    Args:
        backend (str): That of ``torch.compile``. Defaults to 'inductor', which needs a C++
            compiler on a CPU, and Triton on a GPU.
        mode (str, optional): That of ``torch.compile``. Defaults to None: torch's.

    Raises:
        ValueError: If torch has no such backend, or, before training, the model has no backbone
            that can be compiled.
    """

    def __init__(self, backend: Name = 'inductor', mode: Name | None = None) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(
                f'CompileHook: backend={backend!r} is none that torch knows; choose one of '
                f'{", ".join(known)}.'
            )
        self.options = dict(backend=backend) if mode is None else dict(backend=backend, mode=mode)

    def before_train(self, runner: Runner) -> None:
        """Compile."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        compiled = compile_backbones(model, **self.options)
        runner.logger.info(f'Compiled: {", ".join(compiled)}. The first steps take longer.')

    def after_run(self, runner: Runner) -> None:
        """Let go of the code, which would keep DDP and its process group alive."""
        torch._dynamo.reset()


def compile_backbones(model: nn.Module, **options: object) -> list[str]:
    """Compile the backbones of a model, in place.

    Args:
        model (nn.Module): For instance MMPretrain's ``MoCoV3``, or ``SERAlgorithm``.
        **options: Those of ``torch.compile``.

    Returns:
        list[str]: Names of the modules that were compiled.

    Raises:
        ValueError: If there is none.
    """
    backbones = {n: m for n, m in model.named_modules() if isinstance(m, BaseBackbone)}
    if not backbones:
        raise ValueError(
            f'CompileHook: {type(model).__name__} has no backbone of MMPretrain to compile; leave '
            'the hook out.'
        )
    dynamo = torch._dynamo.config
    dynamo.cache_size_limit = max(dynamo.cache_size_limit, GRAPHS)
    # DDP would cut graphs into buckets, of changing sizes; blocks are about as long as these.
    dynamo.optimize_ddp = False
    for backbone in backbones.values():
        backbone.compile(**options)
    return list(backbones)
