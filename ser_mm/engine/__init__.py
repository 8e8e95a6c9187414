from .checkpointing import AtomicCheckpointHook
from .hooks import EpochSeedHook, FreezeLayerHook, NonFiniteLossHook, keep_worker_seed

__all__ = [
    'AtomicCheckpointHook',
    'EpochSeedHook',
    'FreezeLayerHook',
    'NonFiniteLossHook',
    'keep_worker_seed',
]
