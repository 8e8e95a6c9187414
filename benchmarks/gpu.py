"""All figures of a training step that need a GPU, by one command of under 10 minutes.

    python benchmarks/gpu.py --release /path/to/SER

For bfloat16 and float16: time, images a second, peak memory and kernels of the variants of step.py,
in turns (``steps``). Then, in the first precision: of SER's step alone the ten operators that take
longest, and the places where the host waits for the device (``operators``); photometry on the
device, images a second (``photometry``); what the allocator takes and how long steps take that have
another grid of b2 each, at first and when they are seen again (``grids``); DDP with synchronised
BatchNorm in one process, and in two, which share a device by gloo where there is one only
(``ranks``). ``--parts`` chooses among these; ``--no-cudnn-attention`` is how SER trains. Each
result is written to the JSON file as it comes. Without a GPU all runs on the CPU, at a size to be
chosen, as a trial:

    python benchmarks/gpu.py --batch-size 4 --equi-ratio 0.5 --steps 1 --warmup 0 --backend eager
"""

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from step import (
    PRECISIONS,
    RELEASE,
    ROOT,
    add_step_arguments,
    check_step_arguments,
    device_name,
    make_step_table,
    measure,
    one_rank,
    prepare,
    synchronize,
    variants_of,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ser_mm.evaluation.cost import TrainingStep
from ser_mm.evaluation.results import make_table

VARIANTS = [
    'baseline',
    'baseline, compiled',
    'SER',
    'SER, compiled',
    'SER, two passes',
    'SER, photometry on the device',
    "MMPretrain's MoCo v3",
]


def top_operators(step: Callable[[], None], count: int = 10) -> list[dict]:
    """The operators that take most of a step on the device, and their share of it in time."""
    cuda = get_device() == 'cuda'
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    with profile(activities=kinds) as recorded:
        step()
    own = 'self_device_time_total' if cuda else 'self_cpu_time_total'
    # Kernels are events of their own beside the operators that launch them, which have their time.
    operators = [e for e in recorded.key_averages() if e.device_type == DeviceType.CPU]
    events = sorted(operators, key=lambda e: -getattr(e, own))
    total = sum(getattr(e, own) for e in events) or 1
    return [
        dict(
            name=e.key,
            calls=e.count,
            milliseconds=getattr(e, own) / 1e3,
            share=getattr(e, own) / total,
        )
        for e in events[:count]
    ]


def host_waits(step: Callable[[], None]) -> dict[str, int] | None:
    """Lines at which the host waits for the device in a step, and how often; None without a GPU."""
    if get_device() != 'cuda':
        return None
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    waits = [w for w in caught if 'called a synchronizing' in str(w.message)]
    places = Counter(f'{Path(w.filename).name}:{w.lineno}' for w in waits)
    return dict(places.most_common())


def photometry(args: argparse.Namespace) -> dict[str, float]:
    """Images a second, both views, that the preprocessor copies, changes and normalizes."""
    cfg = Config.fromfile(ROOT / 'configs/ser_mocov3_vits16_device_views.py')
    step = TrainingStep(cfg, args.batch_size, args.equi_ratio)
    seconds = []
    for _ in range(args.warmup + args.steps):
        synchronize()
        start = time.perf_counter()
        step.model.data_preprocessor(step.batch, True)
        synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[args.warmup :])
    return dict(seconds=median, images_per_second=args.batch_size / median)


def changing_grids(args: argparse.Namespace, precision: str) -> dict[str, dict]:
    """Steps with another grid of b2 each, twice the same, beside those of the baseline.

    ``first`` and ``again`` are the median seconds of a step, ``longest`` the longest of the first
    time; ``allocated`` and ``reserved`` the peaks of what was used and of what the allocator took,
    in bytes; ``graphs`` those that were compiled.
    """
    cuda = get_device() == 'cuda'
    rows = {}
    for name in ('baseline', 'SER', 'SER, compiled'):
        if name not in args.variants:
            continue
        step = variants_of(args)[name](precision)
        step()  # the state of the optimizer
        let_go()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        graphs = torch._dynamo.utils.counters['stats']
        before = graphs['unique_graphs']
        seconds = [[], []]
        for times in seconds:
            for seed in range(args.steps):
                torch.manual_seed(seed)
                synchronize()
                start = time.perf_counter()
                step.model.train_step(step.batch, step.optim_wrapper)
                synchronize()
                times.append(time.perf_counter() - start)
        rows[name] = dict(
            first=statistics.median(seconds[0]),
            longest=max(seconds[0]),
            again=statistics.median(seconds[1]),
            allocated=torch.cuda.max_memory_allocated() if cuda else None,
            reserved=torch.cuda.max_memory_reserved() if cuda else None,
            graphs=graphs['unique_graphs'] - before,
        )
        del step
        let_go()
    return rows


def one_process(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """A few steps of SER in DDP with synchronised BatchNorm, by NCCL on a GPU."""
    with one_rank():
        return _ddp(args, precision)


def two_processes(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The same in two processes with half of the batch each."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_rank, (folder, args, precision), nprocs=2, start_method='spawn')
        except mp.ProcessException as error:
            return dict(error=str(error).strip().splitlines()[-1])
        return json.loads(Path(folder, 'result.json').read_text())


def _rank(rank: int, folder: str, args: argparse.Namespace, precision: str) -> None:
    devices = torch.cuda.device_count() if get_device() == 'cuda' else 0
    if devices:
        torch.cuda.set_device(rank % devices)
    backend = 'nccl' if devices > 1 else 'gloo'  # NCCL wants a device for each
    dist.init_process_group(
        backend, f'file://{folder}/store', rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    prepare()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn_attention)
    options = argparse.Namespace(**{**vars(args), 'batch_size': max(2, args.batch_size // 2)})
    result = _ddp(options, precision)
    if rank == 0:
        Path(folder, 'result.json').write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _ddp(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Time of steps in the process group, each with grids of its own on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    step = variants_of(args)['SER'](precision)
    cuda = get_device() == 'cuda'
    if cuda:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(step.model)
    ddp = MMDistributedDataParallel(
        step.model,
        device_ids=[torch.cuda.current_device()] if cuda else None,
        find_unused_parameters=False,
    )
    seconds = []
    for i in range(1 + min(args.steps, 10)):
        torch.manual_seed(i * ranks + rank)
        synchronize()
        start = time.perf_counter()
        ddp.train_step(step.batch, step.optim_wrapper)
        synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    images = ranks * args.batch_size
    return dict(
        backend=dist.get_backend(),
        ranks=ranks,
        devices=min(ranks, torch.cuda.device_count()) if cuda else 0,
        batch_size=images,
        seconds=median,
        images_per_second=images / median,
    )


def let_go() -> None:
    """Give back what the allocator keeps, and compiled code, of which torch keeps so much only."""
    torch._dynamo.reset()
    gc.collect()
    if get_device() == 'cuda':
        torch.cuda.empty_cache()


PARTS = ('steps', 'operators', 'photometry', 'grids', 'ranks')


def main() -> None:
    """Measure, print, and write JSON as results come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser, VARIANTS)
    parser.add_argument(
        '--precisions', nargs='+', choices=PRECISIONS, default=['bfloat16', 'float16']
    )
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument(
        '--no-cudnn-attention',
        action='store_true',
        help='attention not by cuDNN, as EquivariantSplitHook has it in training',
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/gpu.json'))
    args = parser.parse_args()
    check_step_arguments(parser, args)
    prepare()
    torch.backends.cuda.enable_cudnn_sdp(not args.no_cudnn_attention)
    results: dict[str, Any] = dict(
        about=dict(
            device=device_name(),
            torch=torch.__version__,
            config=args.config.stem,
            batch_size=args.batch_size,
            b2=round(args.equi_ratio * args.batch_size),
            steps=args.steps,
            cudnn_attention=not args.no_cudnn_attention,
        )
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    def write(name: str, result: Any) -> None:
        results[name] = result
        args.out.write_text(json.dumps(results, indent=1))

    def keep(name: str, result: Any, told: str = '') -> None:
        write(name, result)
        after = time.perf_counter() - began
        print(f'\n{name}, after {after:.0f} s\n\n{told or json.dumps(result)}', flush=True)

    print(', '.join(f'{key} {value}' for key, value in results['about'].items()), flush=True)
    first = args.precisions[0]
    for precision in args.precisions if 'steps' in args.parts else ():
        with one_rank() if RELEASE in args.variants else contextlib.nullcontext():
            rows = measure(args, precision, lambda rows, name=precision: write(name, rows))
        keep(precision, rows, make_step_table(rows, args.batch_size))
        let_go()
    if 'operators' in args.parts:
        step = variants_of(args)['SER'](first)
        operators = top_operators(step)
        cells = [
            [row['name'], row['calls'], f'{row["milliseconds"]:.2f}', f'{row["share"]:.1%}']
            for row in operators
        ]
        keep('operators', operators, make_table(['operator', 'calls', 'ms', 'share'], cells))
        keep('host_waits', host_waits(step))
        del step
        let_go()
    if 'photometry' in args.parts:
        keep('photometry', photometry(args))
    if 'grids' in args.parts:
        keep('grids', changing_grids(args, first))
    if 'ranks' in args.parts:
        keep('one_rank', one_process(args, first))
        let_go()
        keep('two_ranks', two_processes(args, first))


if __name__ == '__main__':
    main()
