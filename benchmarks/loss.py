"""Time and memory of SER's loss, beside a direct implementation of its formula.

Forward and backward of one call with both directions, for a growing number of tokens: queries of
each direction, and as many keys. Each measurement has a process of its own, so that its peak of
memory is its own. The direct implementation, which holds all pairs of tokens, is left out where
they would not fit.

    python benchmarks/loss.py --tokens 256 1024 4096
"""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from mmengine.device import get_device
from step import report
from torch import Tensor

from ser_mm.models import SERHead
from ser_mm.views import pack_maps

SIDE = 8
"""Height and width of a map: 64 tokens an image, so that 256 tokens are of 4 images."""

# Logits, mask and exponentials of one direction, and what backward adds, while the other waits.
MATRICES = 6


def direct_loss(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """The formula in the docstring of SERHead, with all pairs of tokens at once."""
    losses = []
    for q, k in zip(queries, keys, strict=True):
        image = torch.arange(len(q), device=q.device).repeat_interleave(SIDE**2)
        q, k = (F.normalize(pack_maps([x]), dim=1) for x in (q, k))
        positive = torch.eye(len(image), dtype=torch.bool, device=q.device)
        ignored = (image[:, None] == image) & ~positive
        logits = (q @ k.t() / 0.5).masked_fill(ignored, -torch.inf)
        losses.append((logits.logsumexp(1) - logits.diagonal()).mean())
    return sum(losses) / len(losses)


LOSSES = {'SERHead': SERHead(temperature=0.5).loss, 'direct': direct_loss}


def measure(name: str, tokens: int, args: argparse.Namespace) -> dict:
    """Forward and backward of one loss.

    Args:
        name (str): Which of ``LOSSES``.
        tokens (int): Queries of each direction.
        args (argparse.Namespace): The command line.

    Returns:
        dict: ``seconds``, the median; ``peak_bytes``, the peak of memory over what was there
        before, of the tensors (GPU) or of the process (CPU, to some MiB); ``loss``.
    """
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cuda = get_device() == 'cuda'

    def run(number: int) -> tuple[float, int, float]:
        shape = number // SIDE**2, args.channels, SIDE, SIDE
        maps = [torch.randn(shape, device=get_device()) for _ in range(4)]
        for x in maps[:2]:  # as with a momentum branch: keys need no gradient
            x.requires_grad_()
            x.grad = torch.zeros_like(x)
        before = reset_peak(cuda)
        start = time.perf_counter()
        loss = LOSSES[name](maps[:2], maps[2:])
        loss.backward()
        peak = peak_memory(cuda)  # which waits for the GPU
        return time.perf_counter() - start, peak - before, loss.item()

    run(2 * SIDE**2)
    torch.manual_seed(0)
    seconds, peaks, losses = zip(*(run(tokens) for _ in range(args.repeats)), strict=True)
    return dict(seconds=statistics.median(seconds), peak_bytes=max(peaks), loss=losses[0])


def reset_peak(cuda: bool) -> int:
    """Forget the peak of memory so far; what is in use, in bytes."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')
    return _of_process('VmRSS')


def peak_memory(cuda: bool) -> int:
    """The peak of memory, in bytes."""
    if cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _of_process('VmHWM')


def _of_process(field: str, path: str = '/proc/self/status') -> int:
    lines = Path(path).read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f'{field}:'))


def available_memory() -> int:
    """Bytes that are free on the device."""
    if get_device() == 'cuda':
        return torch.cuda.mem_get_info()[0]
    return _of_process('MemAvailable', '/proc/meminfo')


def plot(rows: dict[str, dict], path: Path) -> None:
    """Time and memory over tokens, on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    labels = dict(seconds='seconds', peak_bytes='peak memory, MiB')
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name in LOSSES:
            points = [
                (int(tokens), row[name][key] / (2**20 if key == 'peak_bytes' else 1))
                for tokens, row in rows.items()
                if row[name] is not None and row[name][key] > 0
            ]
            axis.loglog([x for x, _ in points], [y for _, y in points], 'o-', label=name)
        axis.set(xlabel='tokens', ylabel=label)
        axis.set_xticks(list(rows), [f'{tokens:,}' for tokens in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print a table, and write JSON and a plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [256, 1024, 4096, 16384, 65536]
    parser.add_argument('--tokens', type=int, nargs='+', default=sizes, help=f'default: {sizes}')
    parser.add_argument('--channels', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=3, help='calls of each (default: 3)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/loss.json'))
    args = parser.parse_args()
    wrong = [tokens for tokens in args.tokens if tokens < 2 * SIDE**2 or tokens % SIDE**2]
    if wrong:
        parser.error(f'--tokens {wrong[0]}: give multiples of {SIDE**2}, from {2 * SIDE**2} up')
    matplotlib.use('Agg')

    # So that glibc gives a freed matrix back at once, and the peak is of those in use together.
    os.environ['MALLOC_MMAP_THRESHOLD_'] = str(2**20)
    spawn = multiprocessing.get_context('spawn')
    rows = {}
    for tokens in args.tokens:
        rows[tokens] = {}
        for name in LOSSES:
            fits = name != 'direct' or MATRICES * 4 * tokens**2 < available_memory()
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                result = process.submit(measure, name, tokens, args).result() if fits else None
            rows[tokens][name] = result
            print(f'{tokens} tokens, {name}: {result or "left out, would not fit"}', flush=True)
    about = dict(channels=args.channels, threads=args.threads, repeats=args.repeats)
    report(args.out, about, rows)
    plot(rows, args.out.with_suffix('.png'))
    print('| tokens | SERHead | direct | SERHead, peak memory | direct, peak memory |')
    print('|---|---|---|---|---|')
    for tokens, row in rows.items():
        results = row.values()
        seconds = [
            f'{result["seconds"]:.3f} s' if result else 'would not fit' for result in results
        ]
        memory = [
            f'{result["peak_bytes"] / 2**20:.0f} MiB' if result else '-' for result in results
        ]
        print(f'| {tokens:,} | {" | ".join(seconds + memory)} |')


if __name__ == '__main__':
    main()
