"""All figures of a training step that need a GPU, by one command of under 10 minutes.

    python benchmarks/gpu.py --release /path/to/SER

For bfloat16 and float16: time, images a second, peak memory and kernels of the variants of step.py,
in turns. Then of SER's step alone: the ten operators that take longest, and the places where the
host waits for the device. Then photometry on the device, images a second; and two processes with
synchronised BatchNorm, on two devices or, where NCCL allows it, on one. Each result is written to
the JSON file as it comes. Without a GPU all runs on the CPU, at a size to be chosen, as a trial:

    python benchmarks/gpu.py --batch-size 4 --equi-ratio 0.5 --steps 1 --warmup 0 --backend eager
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
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
    variants_of,
)
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
    events = sorted(recorded.key_averages(), key=lambda e: -getattr(e, own))
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
    places = Counter(f'{Path(w.filename).name}:{w.lineno}' for w in caught)
    return dict(places.most_common())


def photometry(args: argparse.Namespace) -> dict[str, float]:
    """Images a second, both views, that the preprocessor copies, changes and normalizes."""
    cfg = Config.fromfile(ROOT / 'configs/ser_mocov3_vits16_device_views.py')
    step = TrainingStep(cfg, args.batch_size, args.equi_ratio)
    seconds = []
    for _ in range(args.warmup + args.steps):
        _synchronize()
        start = time.perf_counter()
        step.model.data_preprocessor(step.batch, True)
        _synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[args.warmup :])
    return dict(seconds=median, images_per_second=args.batch_size / median)


def two_ranks(args: argparse.Namespace) -> dict[str, Any]:
    """A few steps of SER in DDP with synchronised BatchNorm, in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_rank, (folder, args), nprocs=2, start_method='spawn')
        except mp.ProcessException as error:
            return dict(error=str(error).strip().splitlines()[-1])
        return json.loads(Path(folder, 'result.json').read_text())


def _rank(rank: int, folder: str, args: argparse.Namespace) -> None:
    cuda = get_device() == 'cuda'
    devices = max(1, torch.cuda.device_count()) if cuda else 1
    if cuda:
        torch.cuda.set_device(rank % devices)
    backend = 'nccl' if cuda else 'gloo'
    dist.init_process_group(backend, f'file://{folder}/store', rank=rank, world_size=2)
    prepare()
    options = argparse.Namespace(**{**vars(args), 'batch_size': max(2, args.batch_size // 2)})
    step = variants_of(options)['SER']('bfloat16')
    if cuda:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(step.model)
    ddp = MMDistributedDataParallel(
        step.model, device_ids=[rank % devices] if cuda else None, find_unused_parameters=False
    )
    seconds = []
    for i in range(args.warmup + args.steps + 1):
        torch.manual_seed(i)
        _synchronize()
        start = time.perf_counter()
        ddp.train_step(step.batch, step.optim_wrapper)
        _synchronize()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        median = statistics.median(seconds[args.warmup + 1 :] or seconds)
        result = dict(
            backend=backend,
            devices=devices,
            batch_size=2 * options.batch_size,
            seconds=median,
            images_per_second=2 * options.batch_size / median,
        )
        Path(folder, 'result.json').write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _synchronize() -> None:
    if get_device() == 'cuda':
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, and write JSON as results come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser, VARIANTS)
    parser.add_argument(
        '--precisions', nargs='+', choices=PRECISIONS, default=['bfloat16', 'float16']
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/gpu.json'))
    args = parser.parse_args()
    check_step_arguments(parser, args)
    prepare()
    results: dict[str, Any] = dict(
        about=dict(
            device=device_name(),
            torch=torch.__version__,
            config=args.config.stem,
            batch_size=args.batch_size,
            b2=round(args.equi_ratio * args.batch_size),
            steps=args.steps,
        )
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def keep(name: str, result: Any) -> None:
        results[name] = result
        args.out.write_text(json.dumps(results, indent=1))

    print(', '.join(f'{key} {value}' for key, value in results['about'].items()), flush=True)
    for precision in args.precisions:
        with one_rank() if RELEASE in args.variants else contextlib.nullcontext():
            rows = measure(args, precision)
        keep(precision, rows)
        print(f'\n{precision}\n\n{make_step_table(rows, args.batch_size)}', flush=True)
    step = variants_of(args)['SER'](args.precisions[0])
    keep('operators', top_operators(step))
    cells = [
        [row['name'], row['calls'], f'{row["milliseconds"]:.2f}', f'{row["share"]:.1%}']
        for row in results['operators']
    ]
    print('\n' + make_table(['SER, operator', 'calls', 'ms', 'share'], cells))
    keep('host_waits', host_waits(step))
    del step
    keep('photometry', photometry(args))
    keep('two_ranks', two_ranks(args))
    for name in ('host_waits', 'photometry', 'two_ranks'):
        print(f'\n{name}: {results[name]}')


if __name__ == '__main__':
    main()
