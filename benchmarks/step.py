"""What SER adds to a training step: time, operators, FLOPs, kernels and memory.

The steps are the real ones (``model.train_step``: preprocessing, forward, backward, optimizer and
momentum update) on one batch of random images, of the baseline, of the baseline with SER's faster
momentum update, of SER, and of SER with b1 and b2 as two passes through the network, as in the
authors' release. The variants take turns, so the ratios are of neighbouring steps and hold when the
speed of the machine drifts.

    python benchmarks/step.py --batch-size 64 --equi-ratio 0.03125
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import ser_mm
from ser_mm.evaluation.cost import TrainingStep, take_turns
from ser_mm.evaluation.results import make_table
from ser_mm.models import SERVisionTransformer
from ser_mm.models.foreach_ema import use_foreach_update
from ser_mm.views import ViewBatch

ROOT = Path(__file__).resolve().parents[1]
STEP_COLUMNS = ['', 's / step', 'images / s', 'time', 'peak memory']


class TwoPassViT(SERVisionTransformer):
    """The same network, which takes b1 and b2 one after the other."""

    def forward(self, x: Tensor | ViewBatch) -> tuple[Tensor, ...]:
        """Embed images, see SERVisionTransformer."""
        if not isinstance(x, ViewBatch):
            return super().forward(x)
        passes = (
            ViewBatch(x.base, x.equi[:0], x.elements[:0]),
            ViewBatch(x.base[:0], x.equi, x.elements),
        )
        passes = [view for view in passes if len(view)]
        outs = [super(TwoPassViT, self).forward(view) for view in passes]
        x.token_maps[self] = passes[-1].token_maps[self]
        return tuple(torch.cat(out) for out in zip(*outs, strict=True))


def use_two_passes(model: nn.Module) -> None:
    """Let the backbones of a model take b1 and b2 one after the other."""
    for module in model.modules():
        if type(module) is SERVisionTransformer:
            module.__class__ = TwoPassViT


def count_kernels(step: Callable[[], None]) -> int:
    """Kernels and copies that a step launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks that time training steps."""
    parser.add_argument('--batch-size', type=int, default=256, help='images (default: 256)')
    parser.add_argument('--equi-ratio', type=float, default=0.01, help='share of b2')
    steps, warmup = (30, 10) if get_device() == 'cuda' else (5, 1)
    parser.add_argument('--steps', type=int, default=steps, help=f'of each (default: {steps})')
    parser.add_argument(
        '--warmup', type=int, default=warmup, help=f'steps before those (default: {warmup})'
    )


def prepare() -> None:
    """What a Runner would set up: scope and log level."""
    init_default_scope('mmpretrain')
    MMLogger.get_instance('benchmark', log_level='ERROR')


def report(out: Path, about: dict, rows: dict[str, dict]) -> None:
    """Write JSON, and print what was measured on which device.

    Args:
        out (Path): File to write.
        about (dict): The circumstances, beside those of the machine.
        rows (dict[str, dict]): Results per variant.
    """
    about = dict(device=device_name(), torch=torch.__version__, ser_mm=ser_mm.__version__) | about
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(about=about, variants=rows), indent=1))
    print(', '.join(f'{key} {value}' for key, value in about.items()), end='\n\n')


def step_cells(row: dict, batch_size: int) -> list[str]:
    """Time and memory of a variant, for a table; without a GPU no memory is measured."""
    memory = '-'
    if row['memory'] is not None:
        memory = f'{row["memory"] / 2**20:.0f} MiB ({row["memory_ratio"]:.3f}x)'
    seconds = row['seconds']
    return [f'{seconds:.3f}', f'{batch_size / seconds:.1f}', f'{row["time_ratio"]:.3f}x', memory]


def device_name() -> str:
    """Name of the processor that runs."""
    device = get_device()
    if device == 'cuda':
        return torch.cuda.get_device_name()
    return f'{processor()}, {torch.get_num_threads()} threads' if device == 'cpu' else device


def processor() -> str:
    """Name of the processor of the host."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor() or platform.machine()


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', type=Path, default=ROOT / 'configs/ser_mocov3_vits16.py')
    parser.add_argument('--baseline', type=Path, default=ROOT / 'configs/mocov3_vits16.py')
    add_step_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/step.json'))
    args = parser.parse_args()

    prepare()
    asked = {
        'baseline': (args.baseline, None),
        "baseline, SER's momentum update": (args.baseline, use_foreach_update),
        'SER': (args.config, None),
        'SER, two passes': (args.config, use_two_passes),
    }
    variants = {
        name: TrainingStep(Config.fromfile(config), args.batch_size, args.equi_ratio, change)
        for name, (config, change) in asked.items()
    }
    rows = take_turns(variants, args.steps, args.warmup)
    for name, row in rows.items():
        row['kernels'] = count_kernels(variants[name]) if get_device() == 'cuda' else None
        row.update(variants[name].count())
        for key in ('operators', 'flops'):
            row[f'{key}_ratio'] = row[key] / rows['baseline'][key]
    about = dict(
        config=args.config.stem,
        batch_size=args.batch_size,
        b2=round(args.equi_ratio * args.batch_size),
        steps=args.steps,
    )
    report(args.out, about, rows)
    table = [
        [
            name,
            *step_cells(row, args.batch_size),
            row['kernels'] or '-',
            f'{row["operators"]} ({row["operators_ratio"]:.3f}x)',
            f'{row["flops"] / 1e9:.1f} G ({row["flops_ratio"]:.4f}x)',
        ]
        for name, row in rows.items()
    ]
    print(make_table([*STEP_COLUMNS, 'kernels', 'operators', 'FLOPs'], table))


if __name__ == '__main__':
    main()
