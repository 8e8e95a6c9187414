from .hooks import EpochSeedHook, FreezeLayerHook, NonFiniteLossHook, keep_worker_seed

__all__ = ['EpochSeedHook', 'FreezeLayerHook', 'NonFiniteLossHook', 'keep_worker_seed']
