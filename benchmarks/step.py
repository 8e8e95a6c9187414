"""What SER adds to a training step: time, operators, FLOPs, kernels and memory.

The steps are the real ones (``model.train_step``: preprocessing, forward, backward, optimizer and
momentum update) on one batch of random images, of the baseline, of the baseline with SER's faster
momentum update, and of SER with b1 and b2 in one pass through the network, as on a GPU, and in two,
as on a CPU and in the authors' release. The variants take turns, so the ratios are of neighbouring
steps and hold when the speed of the machine drifts.

    python benchmarks/step.py --batch-size 64 --equi-ratio 0.03125

``--variants`` chooses among these and further ones: compiled backbones, photometry on the device,
MMPretrain's own MoCo v3 and, with ``--release``, the authors' release (see authors.py).
"""

import argparse
import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

import ser_mm
from ser_mm.engine.compiling import compile_backbones
from ser_mm.engine.cpu import limit_operator_caches
from ser_mm.evaluation.cost import TrainingStep, take_turns
from ser_mm.evaluation.results import make_table
from ser_mm.models import SERVisionTransformer
from ser_mm.models.foreach_ema import use_foreach_update

ROOT = Path(__file__).resolve().parents[1]
STEP_COLUMNS = ['', 's / step', 'images / s', 'time', 'peak memory']


def in_one_pass(one_pass: bool) -> Callable[[nn.Module], None]:
    """What lets the backbones of a model take b1 and b2 packed, or one after the other."""

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, SERVisionTransformer):
                module.one_pass = one_pass

    return change


def count_kernels(step: Callable[[], None]) -> int:
    """Kernels and copies that a step launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(
        e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
        for e in profile.events()
    )


PRECISIONS = ('float32', 'bfloat16', 'float16')
OURS = ROOT / 'configs/ser_mocov3_vits16.py'
BASELINE = ROOT / 'configs/mocov3_vits16.py'
MMPRETRAIN = 'mmpretrain::mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.py'
RELEASE = "authors' release"


def variants_of(args: argparse.Namespace) -> dict[str, Callable[[str], Any]]:
    """What can be timed: from a name to a function that makes the step in a precision."""

    def ours(
        config: Path | str, change: Callable[[nn.Module], None] | None = None
    ) -> Callable[[str], TrainingStep]:
        def build(precision: str) -> TrainingStep:
            external = isinstance(config, str)
            cfg = get_config(config) if external else Config.fromfile(config)
            cfg.optim_wrapper.type = 'OptimWrapper' if precision == 'float32' else 'AmpOptimWrapper'
            for key in ('loss_scale', 'dtype'):
                cfg.optim_wrapper.pop(key, None)
            if precision == 'bfloat16' and get_device() == 'cpu':  # also where it is slower
                cfg.optim_wrapper.type = 'mmengine.CPUAmpOptimWrapper'
            elif precision != 'float32':
                scale = 'dynamic' if precision == 'float16' else 1.0
                cfg.optim_wrapper.update(dtype=precision, loss_scale=scale)
            return TrainingStep(cfg, args.batch_size, args.equi_ratio, change)

        return build

    def release(precision: str) -> Callable[[], None]:
        from authors import Release

        return Release(args.release.resolve(), args, precision)

    def compiled(model: nn.Module) -> None:
        compile_backbones(model, backend=args.backend)

    return {
        'baseline': ours(args.baseline),
        "baseline, SER's momentum update": ours(args.baseline, use_foreach_update),
        'baseline, compiled': ours(args.baseline, compiled),
        'SER': ours(args.config),
        'SER, compiled': ours(args.config, compiled),
        'SER, one pass': ours(args.config, in_one_pass(True)),
        'SER, two passes': ours(args.config, in_one_pass(False)),
        'SER, photometry on the device': ours(ROOT / 'configs/ser_mocov3_vits16_device_views.py'),
        # On the CPU torch's synchronised BatchNorm refuses to work in a process group.
        "MMPretrain's MoCo v3": ours(
            MMPRETRAIN, revert_sync_batchnorm if get_device() == 'cpu' else None
        ),
        RELEASE: release,
    }


DEFAULT = ['baseline', "baseline, SER's momentum update", 'SER, one pass', 'SER, two passes']


def add_step_arguments(parser: argparse.ArgumentParser, variants: list[str]) -> None:
    """The arguments of benchmarks that time training steps."""
    parser.add_argument('--config', type=Path, default=OURS)
    parser.add_argument('--baseline', type=Path, default=BASELINE)
    parser.add_argument('--variants', nargs='+', default=variants, help=f'default: {variants}')
    parser.add_argument('--release', type=Path, help="folder of the authors' repository")
    parser.add_argument('--backend', default='inductor', help='of torch.compile')
    parser.add_argument('--batch-size', type=int, default=256, help='images (default: 256)')
    parser.add_argument('--equi-ratio', type=float, default=0.01, help='share of b2')
    steps, warmup = (30, 10) if get_device() == 'cuda' else (5, 1)
    parser.add_argument('--steps', type=int, default=steps, help=f'of each (default: {steps})')
    parser.add_argument(
        '--warmup', type=int, default=warmup, help=f'steps before those (default: {warmup})'
    )


def check_step_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be measured; with ``--release`` the release is one of the variants."""
    if args.release is not None and RELEASE not in args.variants:
        args.variants = [*args.variants, RELEASE]
    unknown = set(args.variants) - set(variants_of(args))
    if unknown:
        parser.error(f'--variants {unknown.pop()!r}: choose from {list(variants_of(args))}')
    if RELEASE not in args.variants:
        return
    if args.release is None or not (args.release / 'builder' / 'moco.py').is_file():
        parser.error(f'{args.release} has no builder/moco.py: give the folder of their repository')
    if not 0 < round(args.equi_ratio * args.batch_size) < args.batch_size:
        parser.error(
            f'--equi-ratio {args.equi_ratio} of {args.batch_size} images leaves b1 or b2 empty, '
            'which the release cannot train on; give another one'
        )


def measure(
    args: argparse.Namespace,
    precision: str = 'float32',
    keep: Callable[[dict[str, dict]], None] | None = None,
) -> dict[str, dict]:
    """Time the variants in turns, then count.

    Args:
        args (argparse.Namespace): The command line.
        precision (str): Of ``PRECISIONS``.
        keep (Callable[[dict], None], optional): Called with what there is after the turns, and
            after each count. Defaults to None.

    Returns:
        dict[str, dict]: By name, what :func:`~ser_mm.evaluation.cost.take_turns` measures,
        ``first_seconds``, of the first step, with compiling in it, ``images_per_second``,
        ``kernels`` (GPU) and, but for compiled ones and the release, ``operators`` and ``flops``.
    """
    builders = variants_of(args)
    steps = {name: builders[name](precision) for name in args.variants}
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        synchronize()
        first[name] = time.perf_counter() - start
    rows = take_turns(steps, args.steps, args.warmup)
    for name, row in rows.items():
        row['precision'] = precision_of(steps[name])
        row['first_seconds'] = first[name]
        row['images_per_second'] = args.batch_size / row['seconds']
        row['kernels'] = None
    for name, row in rows.items():
        if keep is not None:
            keep(rows)
        row['kernels'] = count_kernels(steps[name]) if get_device() == 'cuda' else None
        if isinstance(steps[name], TrainingStep) and 'compiled' not in name:
            row.update(steps[name].count())
    base = next(iter(rows.values()))
    for row in rows.values():
        for key in ('operators', 'flops'):
            if key in row and key in base:
                row[f'{key}_ratio'] = row[key] / base[key]
    return rows


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if get_device() == 'cuda':
        torch.cuda.synchronize()


def precision_of(step: Any) -> str:
    """The precision that a step has on this device; a config's own may not exist there."""
    wrapper = getattr(step, 'optim_wrapper', None)
    if wrapper is None:
        return step.precision
    cast = getattr(wrapper, 'cast_dtype', torch.float32)
    return str(cast or torch.float16).removeprefix('torch.')


def prepare() -> None:
    """What training would set up: scope, log level and the caches of a CPU's operators."""
    limit_operator_caches()
    init_default_scope('mmpretrain')
    MMLogger.get_instance('benchmark', log_level='ERROR')


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one, which the release asks for."""
    with tempfile.TemporaryDirectory() as folder:
        backend = 'nccl' if get_device() == 'cuda' else 'gloo'
        dist.init_process_group(backend, f'file://{folder}/store', rank=0, world_size=1)
        yield
        dist.destroy_process_group()


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


def make_step_table(rows: dict[str, dict], batch_size: int) -> str:
    """Time, memory and counts of variants, and their precision where they differ in it."""
    table = []
    mixed = len({row['precision'] for row in rows.values()}) > 1
    for name, row in rows.items():
        counted = ['-', '-']
        if 'operators_ratio' in row:
            counted = [
                f'{row["operators"]} ({row["operators_ratio"]:.3f}x)',
                f'{row["flops"] / 1e9:.1f} G ({row["flops_ratio"]:.4f}x)',
            ]
        first = f'{row["first_seconds"]:.1f}'
        kernels = row['kernels'] or '-'
        name = f'{name}, {row["precision"]}' if mixed else name
        table.append([name, *step_cells(row, batch_size), first, kernels, *counted])
    return make_table([*STEP_COLUMNS, 'first step, s', 'kernels', 'operators', 'FLOPs'], table)


def main(argv: Sequence[str] | None = None, variants: list[str] = DEFAULT) -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_step_arguments(parser, variants)
    parser.add_argument('--precision', choices=PRECISIONS, default=None)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/step.json'))
    args = parser.parse_args(argv)
    check_step_arguments(parser, args)

    prepare()
    precision = args.precision or ('float16' if get_device() == 'cuda' else 'float32')
    with one_rank() if RELEASE in args.variants else contextlib.nullcontext():
        rows = measure(args, precision)
    about = dict(
        config=args.config.stem,
        batch_size=args.batch_size,
        b2=round(args.equi_ratio * args.batch_size),
        steps=args.steps,
    )
    report(args.out, about, rows)
    print(make_step_table(rows, args.batch_size))


if __name__ == '__main__':
    main()
