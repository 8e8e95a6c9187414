from .checkpointing import AtomicCheckpointHook
from .compiling import CompileHook
from .hooks import (
    EpochSeedHook,
    EquivariantSplitHook,
    FreezeLayerHook,
    MomentumUpdateHook,
    NonFiniteLossHook,
    keep_worker_seed,
)
from .precision import CPUAmpOptimWrapper
from .resuming import ResumeHook

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'CompileHook',
    'EpochSeedHook',
    'EquivariantSplitHook',
    'FreezeLayerHook',
    'MomentumUpdateHook',
    'NonFiniteLossHook',
    'ResumeHook',
    'keep_worker_seed',
]
