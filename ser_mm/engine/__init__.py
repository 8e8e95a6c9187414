from .checkpointing import AtomicCheckpointHook
from .hooks import (
    EpochSeedHook,
    EquivariantSplitHook,
    FreezeLayerHook,
    MomentumUpdateHook,
    NonFiniteLossHook,
    keep_worker_seed,
)

__all__ = [
    'AtomicCheckpointHook',
    'EpochSeedHook',
    'EquivariantSplitHook',
    'FreezeLayerHook',
    'MomentumUpdateHook',
    'NonFiniteLossHook',
    'keep_worker_seed',
]
