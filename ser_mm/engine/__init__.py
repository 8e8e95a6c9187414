from .hooks import (
    EpochSeedHook,
    EquivarianceHook,
    FreezeLayerHook,
    NonFiniteLossHook,
    keep_worker_seed,
)

__all__ = [
    'EpochSeedHook',
    'EquivarianceHook',
    'FreezeLayerHook',
    'NonFiniteLossHook',
    'keep_worker_seed',
]
