from .checkpointing import AtomicCheckpointHook
from .hooks import (
    EpochSeedHook,
    FreezeLayerHook,
    MomentumUpdateHook,
    NonFiniteLossHook,
    keep_worker_seed,
)

__all__ = [
    'AtomicCheckpointHook',
    'EpochSeedHook',
    'FreezeLayerHook',
    'MomentumUpdateHook',
    'NonFiniteLossHook',
    'keep_worker_seed',
]
