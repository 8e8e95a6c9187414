from .hooks import EpochSeedHook, NonFiniteLossHook, keep_worker_seed

__all__ = ['EpochSeedHook', 'NonFiniteLossHook', 'keep_worker_seed']
