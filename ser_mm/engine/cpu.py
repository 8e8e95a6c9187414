"""What a config written for GPUs needs before it runs on a CPU: process group, types, memory."""

import gc
import os
import subprocess
from datetime import timedelta

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from ser_mm.engine.checks import DATALOADERS
from ser_mm.engine.precision import is_bfloat16_faster

# Where each launcher leaves what torch.distributed reads from RANK, WORLD_SIZE and LOCAL_RANK.
_TORCH_VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')


_LAUNCHER_VARIABLES = dict(
    pytorch=_TORCH_VARIABLES,
    slurm=('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    mpi=('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
)


def get_local_rank(launcher: str) -> int:
    """Rank of this process on its machine, known before there is a process group.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
    """
    return _number(launcher, 2)


def get_global_rank(launcher: str) -> int:
    """Rank of this process among all, known before there is a process group.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
    """
    return _number(launcher, 0)


def _number(launcher: str, variable: int) -> int:
    if launcher == 'none':
        return 0
    return int(os.environ.get(_LAUNCHER_VARIABLES[launcher][variable], 0))


def init_cpu_process_group(launcher: str, timeout: float | None = None) -> bool:
    """Make the gloo process group of a distributed run on machines without an accelerator.

    MMEngine's launchers select a CUDA device first and so cannot start on the CPU, whatever the
    backend. The Runner leaves a process group alone that is there already, so call this before
    building it. Does nothing with an accelerator, without a launcher, or when a group exists.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
        timeout (float, optional): Seconds until a collective operation fails. Defaults to None,
            torch's own.

    Returns:
        bool: Whether a group was made.
    """
    if launcher == 'none' or get_device() != 'cpu' or dist.is_initialized():
        return False
    for name, source in zip(_TORCH_VARIABLES, _LAUNCHER_VARIABLES[launcher], strict=True):
        os.environ[name] = os.environ[source]
    if launcher == 'slurm' and 'MASTER_ADDR' not in os.environ:
        show_hosts = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
        os.environ['MASTER_ADDR'] = subprocess.check_output(show_hosts, text=True).split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')
    dist.init_process_group('gloo', timeout=timedelta(seconds=timeout) if timeout else None)
    return True


def count_cores() -> int:
    """CPU cores that this process may use, all of the machine where the system does not say."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_operator_caches() -> None:
    """Keep what oneDNN prepared for a size for 64 sizes only, unless the environment says else.

    b2 has another number of tokens in every batch. In bfloat16 a process that kept what it prepared
    for all of them grew by half (docs/howto/resume.md), and was no faster. oneDNN and what torch
    has in front of it read these variables when they are first used.
    """
    for variable in ('ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY'):
        os.environ.setdefault(variable, '64')


def close_process_group() -> None:
    """Leave the process group, if there is one; the last thing that a distributed run does.

    To be called when the Runner is out of scope. Gloo's worker threads end with their group,
    which DDP keeps alive; one that is still letting go of a tensor when Python shuts down aborts
    a process that had finished its work (seen in 9 of 20 runs, and in none of 14 with this).
    """
    if dist.is_initialized():
        gc.collect()  # the Runner and DDP are in reference cycles
        dist.destroy_process_group()


def adapt_to_device(cfg: Config) -> None:
    """Let a config written for GPUs run on the CPU; with an accelerator, leave it alone.

    Mixed precision of MMEngine, synchronised BatchNorm and pinned memory do not exist on the CPU.
    A config that asks for bfloat16 gets it where that is faster, see
    :class:`~ser_mm.engine.precision.CPUAmpOptimWrapper`; other mixed precision is float32. Every
    change is logged. Without synchronised BatchNorm each process takes the statistics of its own
    share of the batch, which makes no difference to a run of one process.

    Args:
        cfg (Config): Config of the run, changed in place.
    """
    if get_device() != 'cpu':
        return

    optim_wrapper = cfg.get('optim_wrapper') or {}
    if type_name(optim_wrapper) == 'AmpOptimWrapper':
        asked = str(optim_wrapper.get('dtype')).removeprefix('torch.')
        bfloat16 = asked == 'bfloat16' and _agreed(is_bfloat16_faster())
        kind = 'mmengine.CPUAmpOptimWrapper' if bfloat16 else 'OptimWrapper'
        optim_wrapper['type'] = kind
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            optim_wrapper.pop(key, None)
        precision = 'bfloat16' if bfloat16 else 'float32'
        _log_change(f'optim_wrapper.type: AmpOptimWrapper -> {kind} ({precision})')

    if cfg.get('sync_bn'):
        _log_change(f'sync_bn: {cfg.sync_bn} -> None (BatchNorm per process)')
        cfg.sync_bn = None

    pinned = [name for name in DATALOADERS if (cfg.get(name) or {}).get('pin_memory')]
    for name in pinned:
        cfg[name].pin_memory = False
    if pinned:
        _log_change(f'pin_memory: True -> False ({", ".join(pinned)})')

    if cfg.get('launcher', 'none') != 'none':
        _adapt_distributed(cfg)


def _adapt_distributed(cfg: Config) -> None:
    """Replace NCCL by gloo, and leave out the device numbers DDP refuses for a CPU model."""
    backend = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('backend')
    if backend != 'gloo':
        cfg.merge_from_dict({'env_cfg.dist_cfg.backend': 'gloo'})
        _log_change(f'env_cfg.dist_cfg.backend: {backend} -> gloo')
    if cfg.get('model_wrapper_cfg') is None:
        # What the Runner uses when none is configured, but for the device numbers.
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.model_wrapper_cfg.get('device_ids', ()) is not None:
        cfg.model_wrapper_cfg.device_ids = None
        _log_change('model_wrapper_cfg.device_ids: local rank -> None')


def _agreed(value: bool) -> bool:
    """What all ranks say, as tensors of two types cannot be exchanged."""
    if not dist.is_initialized():
        return value
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


def type_name(cfg: dict) -> str:
    """Bare name of the class that a config names by string (scoped or not) or gives itself.

    Args:
        cfg (dict): Config with ``type``; the name is empty without it.
    """
    kind = cfg.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _log_change(change: str) -> None:
    print_log(f'No GPU here, changed {change}', logger='current')
