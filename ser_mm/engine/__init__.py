from .checkpointing import AtomicCheckpointHook
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
    'EpochSeedHook',
    'EquivariantSplitHook',
    'FreezeLayerHook',
    'MomentumUpdateHook',
    'NonFiniteLossHook',
    'ResumeHook',
    'keep_worker_seed',
]
