"""Peak memory and time of many training steps on a CPU, with SER beside its baseline.

SER's b2 has another size in every batch, and what an allocator makes of that shows after many steps
only. Each variant runs in a process of its own, one after the other; a variant whose figures are
there already, of the same settings, is not run again.

    python benchmarks/memory.py --batch-size 256 --steps 1000 --bfloat16
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from step import ROOT, prepare, report

from ser_mm.evaluation.cost import TrainingStep
from ser_mm.evaluation.results import make_table

VARIANTS = {'baseline': 'configs/demo/mocov3.py', 'SER': 'configs/demo/ser_mocov3.py'}
IMAGE = 64
EVERY = 10
"""Steps between two readings."""


def config(name: str, bfloat16: bool) -> Config:
    """The demo's model, on 64 tokens."""
    cfg = Config.fromfile(ROOT / VARIANTS[name])
    cfg.model.get('algorithm', cfg.model).backbone.img_size = IMAGE
    for view in cfg.train_dataloader.dataset.pipeline[1].transforms:
        view[0].scale = IMAGE
    if bfloat16:  # also where it is slower
        cfg.optim_wrapper.type = 'mmengine.CPUAmpOptimWrapper'
    return cfg


def memory(key: str) -> float:
    """Of this process, in MiB: 'VmRSS', what it has now, or 'VmHWM', its peak."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def run(name: str, args: argparse.Namespace) -> dict:
    """Train; memory in MiB, at the peak and after every tenth step, and seconds a step."""
    prepare()
    step = TrainingStep(config(name, args.bfloat16), args.batch_size, args.equi_ratio)
    torch.manual_seed(1)
    start, readings, began = memory('VmRSS'), [], time.perf_counter()
    for i in range(args.steps):
        step.model.train_step(step.batch, step.optim_wrapper)  # a new grid of b2 in each
        if (i + 1) % EVERY == 0:
            readings.append(memory('VmRSS'))
            print(f'{name}: step {i + 1}, {readings[-1]:.0f} MiB', file=sys.stderr, flush=True)
    seconds = (time.perf_counter() - began) / args.steps
    peak = memory('VmHWM')
    return dict(start=start, peak=peak, seconds=seconds, every=EVERY, readings=readings)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--batch-size', type=int, default=256, help='images (default: 256)')
    parser.add_argument('--equi-ratio', type=float, default=1 / 16, help='share of b2')
    parser.add_argument('--steps', type=int, default=1000, help='of each (default: 1000)')
    parser.add_argument('--bfloat16', action='store_true', help='instead of float32')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/memory.json'))
    parser.add_argument('--only', choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()

    about = dict(
        batch_size=args.batch_size,
        b2=round(args.equi_ratio * args.batch_size),
        steps=args.steps,
        bfloat16=args.bfloat16,
    )
    files = {name: args.out.with_suffix(f'.{name}.json') for name in VARIANTS}
    if args.only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        files[args.only].write_text(json.dumps(dict(about=about, **run(args.only, args))))
        return
    rows = {}
    for name, file in files.items():
        if not file.is_file() or json.loads(file.read_text())['about'] != about:
            command = [sys.executable, __file__, *sys.argv[1:], '--only', name]
            subprocess.run(command, check=True)
        rows[name] = json.loads(file.read_text())
        rows[name]['ratio'] = rows[name]['peak'] / rows['baseline']['peak']
    report(args.out, about, rows)
    table = [
        [
            name,
            f'{row["start"]:.0f}',
            f'{row["peak"]:.0f}',
            f'{row["ratio"]:.3f}x',
            f'{row["seconds"]:.2f}',
        ]
        for name, row in rows.items()
    ]
    print(make_table(['', 'MiB at start', 'MiB at the peak', 'ratio', 's / step'], table))


if __name__ == '__main__':
    main()
