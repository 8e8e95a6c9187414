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
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ser_mm
from ser_mm.engine.runtime import adapt_to_device
from ser_mm.evaluation.cost import OperatorCounter
from ser_mm.models import SERVisionTransformer
from ser_mm.models.foreach_ema import use_foreach_update
from ser_mm.views import ViewBatch

ROOT = Path(__file__).resolve().parents[1]


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


class Variant:
    """A model, its optimizer and its batch.

    Args:
        config (Path | Config): Config of the model.
        two_passes (bool): Whether to take b1 and b2 one after the other.
        args (argparse.Namespace): The command line.
        foreach (bool): Whether to update the momentum branch as SER does. Defaults to False.
    """

    def __init__(
        self,
        config: Path | Config,
        two_passes: bool,
        args: argparse.Namespace,
        foreach: bool = False,
    ) -> None:
        cfg = config if isinstance(config, Config) else Config.fromfile(config)
        adapt_to_device(cfg)
        torch.manual_seed(0)
        self.model = MODELS.build(cfg.model)
        self.model.init_weights()
        if two_passes:
            for module in self.model.modules():
                if type(module) is SERVisionTransformer:
                    module.__class__ = TwoPassViT
        if foreach:
            use_foreach_update(self.model)
        self.model.to(args.device).train()
        self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        side = self._image_size()
        size = args.batch_size
        shape, pinned = (size, 3, side, side), torch.device(args.device).type == 'cuda'
        views = [torch.randint(256, shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        record = torch.full((size, 2), -1)
        in_b2 = round(args.equi_ratio * size)
        record[size - in_b2 :] = torch.randint(8, (in_b2, 2))
        is_ser = cfg.model.type == 'SERAlgorithm'
        self.batch = dict(inputs=[*views, record] if is_ser else views, data_samples=None)

    def _image_size(self) -> int:
        sizes = (getattr(module, 'img_size', None) for module in self.model.modules())
        return next((size[0] for size in sizes if size), 224)

    def step(self) -> None:
        """One training step."""
        torch.manual_seed(0)  # the same sizes of b2 in every step
        self.model.train_step(self.batch, self.optim_wrapper)

    def count(self) -> dict[str, int]:
        """Operators and FLOPs of forward, loss and backward; on a GPU, kernels of the step."""
        kernels = count_kernels(self.step) if next(self.model.parameters()).is_cuda else None
        torch.manual_seed(0)
        for ema in (m for m in self.model.modules() if hasattr(m, 'update_parameters')):
            ema.update_parameters = lambda model: None
        data = self.model.data_preprocessor(self.batch, True)
        flops = FlopCounterMode(display=False)
        with OperatorCounter() as operators, flops, self.optim_wrapper.optim_context(self.model):
            loss, _ = self.model.parse_losses(self.model(**data, mode='loss'))
            loss.backward()
        self.model.zero_grad()
        return dict(
            operators=operators.counts.total(), flops=flops.get_total_flops(), kernels=kernels
        )


def count_kernels(step: Callable[[], None]) -> int:
    """Kernels and copies that a step launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def take_turns(steps: Mapping[str, Callable[[], None]], args: argparse.Namespace) -> dict:
    """Time variants of a training step, one step of each after the other.

    Args:
        steps (Mapping[str, Callable[[], None]]): What runs a step of each variant.
        args (argparse.Namespace): The command line: batch_size, steps, warmup and device.

    Returns:
        dict[str, dict]: Per variant the median ``seconds``, ``images_per_second``, ``time_ratio``,
        the median over rounds of the ratio to the first variant, and on a GPU
        ``step_memory_bytes``, the peak during the step over what was allocated before.
    """
    cuda = torch.device(args.device).type == 'cuda'
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    times = {name: [] for name in steps}
    memory = {}
    for i in range(args.warmup + args.steps):
        for name, step in steps.items():
            synchronize()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step()
            synchronize()
            if i >= args.warmup:
                times[name].append(time.perf_counter() - start)
            if cuda:
                memory[name] = torch.cuda.max_memory_allocated() - before
        print(f'round {i + 1} of {args.warmup + args.steps}', flush=True)
    first = next(iter(times))
    rows = {}
    for name in steps:
        ratios = [a / b for a, b in zip(times[name], times[first], strict=True)]
        median = statistics.median(times[name])
        rows[name] = dict(
            seconds=median,
            images_per_second=args.batch_size / median,
            time_ratio=statistics.median(ratios),
            time_ratios=ratios,
            step_memory_bytes=memory.get(name),
        )
    return rows


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks that time training steps."""
    parser.add_argument('--batch-size', type=int, default=256, help='images (default: 256)')
    parser.add_argument('--equi-ratio', type=float, default=0.01, help='share of b2')
    parser.add_argument('--steps', type=int, default=5, help='counted steps of each variant')
    parser.add_argument('--warmup', type=int, default=1, help='steps before those')
    parser.add_argument('--device', default=get_device())


def prepare() -> None:
    """What a Runner would set up: scope, log level, and the length of the momentum schedule."""
    init_default_scope('mmpretrain')
    MMLogger.get_instance('benchmark', log_level='ERROR')
    MessageHub.get_current_instance().update_info('max_iters', 1000)


def report(out: Path, about: dict, rows: dict[str, dict], device: str) -> None:
    """Write JSON, and print what was measured on which device.

    Args:
        out (Path): File to write.
        about (dict): The circumstances, beside those of the machine.
        rows (dict[str, dict]): Results per variant.
        device (str): 'cpu', 'cuda', ...
    """
    machine = dict(device=device_name(device), torch=torch.__version__, ser_mm=ser_mm.__version__)
    about = machine | about
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(about=about, variants=rows), indent=1))
    print(', '.join(f'{key} {value}' for key, value in about.items()), end='\n\n')


def memory_column(row: dict) -> str:
    """Peak memory of a step for a table; there is none but on a GPU."""
    size = row['step_memory_bytes']
    return '-' if size is None else f'{size / 2**20:.0f} MiB'


def device_name(device: str) -> str:
    """Name of the processor that ran."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if device == 'cpu' else []
    models = [line.partition(': ')[2] for line in lines if line.startswith('model name')]
    return f'{models[0]}, {torch.get_num_threads()} threads' if models else device


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
    variants = {
        'baseline': Variant(args.baseline, False, args),
        "baseline, SER's momentum update": Variant(args.baseline, False, args, foreach=True),
        'SER': Variant(args.config, False, args),
        'SER, two passes': Variant(args.config, True, args),
    }
    rows = take_turns({name: variant.step for name, variant in variants.items()}, args)
    for name, row in rows.items():
        row.update(variants[name].count())
    for row in rows.values():
        for key in ('operators', 'flops'):
            row[f'{key}_ratio'] = row[key] / rows['baseline'][key]
    about = dict(
        config=args.config.stem,
        batch_size=args.batch_size,
        b2=round(args.equi_ratio * args.batch_size),
        steps=args.steps,
    )
    report(args.out, about, rows, args.device)
    print('| | s / step | images / s | time | memory | kernels | operators | FLOPs |')
    print('|---|---|---|---|---|---|---|---|')
    for name, row in rows.items():
        print(
            f'| {name} | {row["seconds"]:.3f} | {row["images_per_second"]:.1f} '
            f'| {row["time_ratio"]:.3f}x | {memory_column(row)} | {row["kernels"] or "-"} '
            f'| {row["operators"]} ({row["operators_ratio"]:.3f}x) '
            f'| {row["flops"] / 1e9:.1f} G ({row["flops_ratio"]:.4f}x) |'
        )


if __name__ == '__main__':
    main()
