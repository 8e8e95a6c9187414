"""What freezing the backbone saves in a training step of a detector: time and memory.

The steps are the real ones (``model.train_step``: preprocessing, forward, backward and optimizer)
on one batch of random images with random boxes and masks. Each variant has a process of its own,
so that its peak of memory is its own.

    python benchmarks/detection_frozen.py --config configs/coco/mask-rcnn_mocov3_vits16.py
"""

import argparse
import json
import logging
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from step import device_name
from torch import Tensor, nn

import ser_mm

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def measure(args: argparse.Namespace, frozen: bool) -> dict:
    """Train some steps.

    Args:
        args (argparse.Namespace): The command line.
        frozen (bool): Whether the backbone is as in the config, or unfrozen.

    Returns:
        dict: ``seconds``, the median over steps; ``peak_mib``, of the process (CPU) or of the
        tensors (GPU); ``kept_mib``, what the backbone's forward pass keeps for backward;
        ``optimized``, the number of parameters in the optimizer.
    """
    from mmdet.registry import MODELS

    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    if not frozen:
        cfg.model.backbone.frozen_stages = -1
    model = MODELS.build(cfg.model).to(get_device())
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = random_batch(args.batch_size, tuple(args.size), num_classes=80)

    seconds = []
    for step in range(-1, args.steps):  # the first one is the warm-up
        start = time.perf_counter()
        model.train_step(batch, optim_wrapper)
        if get_device() == 'cuda':
            torch.cuda.synchronize()
        if step >= 0:
            seconds.append(time.perf_counter() - start)
    if get_device() == 'cuda':
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    groups = optim_wrapper.optimizer.param_groups
    return dict(
        seconds=statistics.median(seconds),
        peak_mib=peak / MIB,
        kept_mib=kept_bytes(model.backbone, model.data_preprocessor(batch, True)['inputs']) / MIB,
        optimized=sum(p.numel() for group in groups for p in group['params']),
    )


def random_batch(count: int, size: tuple[int, int], num_classes: int) -> dict:
    """Images with eight boxes each, as a data loader of MMDetection gives them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    samples = []
    for _ in range(count):
        sides = torch.tensor([size[1], size[0]])
        corners = torch.rand(8, 2) * (sides - 64)
        boxes = torch.cat([corners, corners + 16 + torch.rand(8, 2) * 48], dim=1)
        masks = np.ones((8, *size), np.uint8)
        instances = InstanceData(
            bboxes=HorizontalBoxes(boxes),
            labels=torch.randint(num_classes, (8,)),
            masks=BitmapMasks(masks, *size),
        )
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)),
            gt_instances=instances,
        )
        samples.append(sample)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(count)]
    return dict(inputs=images, data_samples=samples)


def kept_bytes(backbone: nn.Module, images: Tensor) -> int:
    """Memory that a forward pass keeps for backward, without the parameters themselves."""
    parameters = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = backbone(images)
    del outputs
    return sum(kept.values())


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / 'configs/coco/faster-rcnn_mocov3_vits16.py'
    parser.add_argument('--config', type=Path, default=default)
    parser.add_argument('--batch-size', type=int, default=2, help='images (default: 2)')
    parser.add_argument('--size', type=int, nargs=2, default=[800, 1333], metavar=('H', 'W'))
    parser.add_argument('--steps', type=int, default=5, help='counted steps of each variant')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/detection.json'))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    about = dict(
        device=device_name(),
        torch=torch.__version__,
        ser_mm=ser_mm.__version__,
        config=args.config.stem,
        batch_size=args.batch_size,
        size=args.size,
        steps=args.steps,
    )
    rows = {}
    spawn = multiprocessing.get_context('spawn')
    for name, frozen in {'frozen': True, 'unfrozen': False}.items():
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            rows[name] = process.submit(measure, args, frozen).result()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(dict(about=about, variants=rows), indent=1))
    print(', '.join(f'{key} {value}' for key, value in about.items()), end='\n\n')
    print('| backbone | s / step | peak memory | kept by the backbone | parameters optimized |')
    print('|---|---|---|---|---|')
    for name, row in rows.items():
        print(
            f'| {name} | {row["seconds"]:.2f} | {row["peak_mib"]:.0f} MiB '
            f'| {row["kept_mib"]:.0f} MiB | {row["optimized"]:,} |'
        )


if __name__ == '__main__':
    main()
