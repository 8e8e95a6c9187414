"""Run a function in two processes that form a gloo process group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ser_mm.engine.cpu import close_process_group


def on_two_ranks(function: Callable, *args) -> list:
    """What ``function(rank, *args)``, defined at the top of a module, returns on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_run, (function, args, folder), nprocs=2, start_method='spawn')
        return [torch.load(Path(folder) / f'{r}.pt', weights_only=False) for r in range(2)]


def _run(rank: int, function: Callable, args: tuple, folder: str) -> None:
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    result = function(rank, *args)
    torch.save(result, Path(folder) / f'{rank}.pt')
    dist.barrier()
    close_process_group()
