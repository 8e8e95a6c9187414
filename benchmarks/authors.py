"""The training step of the authors' release beside ours: MoCo v3 + SER, ViT-S/16.

The release is not part of this package; fetch it first and say where it is:

    git clone https://github.com/aitrics-chris/SER /path/to/SER
    python benchmarks/authors.py /path/to/SER

Its step is the one of its training loop, with the settings of its recipe: photometry on the device,
forward, loss, mixed precision, backward, optimizer, DDP and synchronised BatchNorm on one rank, and
the losses that it reads back in every step. Ours has its photometry on the device too. Beside them
is MMPretrain's own MoCo v3 without SER and without photometry, with its own ViT and momentum
update. Without a GPU the release, written for one, is run on the CPU by mapping its devices.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from step import ROOT, STEP_COLUMNS, add_step_arguments, prepare, report, step_cells
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ser_mm.evaluation.cost import TrainingStep, take_turns
from ser_mm.evaluation.results import make_table


class OnCPU(TorchFunctionMode):
    """Read the device numbers of code written for GPUs as the CPU."""

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if isinstance(kwargs.get('device'), int):
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


class Release:
    """The authors' model, its optimizer and its batch.

    Args:
        folder (Path): Their repository.
        args (argparse.Namespace): The command line.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        sys.path.insert(0, str(folder))
        import builder.moco
        import builder.utils
        import vision_transformer

        self.train_step = builder.moco.train_erl_inv
        self.options = argparse.Namespace(
            arch='vit_small',
            equiv_mode='erl_inv',
            equiv_layer=3,
            equiv_lambda=1.0,
            equiv_scale=(0.7, 1.3),
            equiv_aspect_ratio=(3 / 4, 4 / 3),
            temperature_equiv=0.5,
            stride=16,
            gpu=0,
            rank=0,
            world_size=1,
            batch_size=args.batch_size,
        )
        self.cuda = get_device() == 'cuda'
        torch.backends.cudnn.benchmark = self.cuda  # as they have it; for all that is compared
        backbone = vision_transformer.vit_small
        model = builder.moco.MoCo_ViT(self.options, backbone, 256, 4096, 0.2)
        if self.cuda:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).cuda()
        self.model = DistributedDataParallel(model, find_unused_parameters=True).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
        self.scaler = torch.GradScaler(device='cuda', enabled=self.cuda)
        self.augment = builder.utils.Aug_equi(0, self.options)
        self.mean, self.std = (
            torch.tensor(value, device=get_device()).view(1, 3, 1, 1)
            for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        shape = args.batch_size, 3, 224, 224
        self.images = [torch.rand(shape, pin_memory=self.cuda) for _ in range(2)]
        self.in_b1 = args.batch_size - round(args.equi_ratio * args.batch_size)

    def __call__(self) -> None:
        """One training step; without a GPU, on the CPU."""
        with contextlib.nullcontext() if self.cuda else OnCPU():
            self._step()

    def _step(self) -> None:
        """As in their loop."""
        torch.manual_seed(0)
        self.augment.set_seed(0)  # the same sizes of b2 in every step
        loss, *parts, _, _ = self.train_step(
            self.model,
            list(self.images),
            self.in_b1,
            self.augment,
            self.mean,
            self.std,
            0.99,
            [],
            [],
            self.options,
            None,
        )
        for value in (loss, *parts, loss):  # which they read for their log
            value.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def mmpretrain_config() -> Config:
    """MMPretrain's MoCo v3 with its own ViT, of the same size."""
    cfg = Config.fromfile(ROOT / 'configs/mocov3_vits16.py')
    backbone = cfg.model.backbone
    backbone.update(type='MoCoV3ViT', norm_eval=False)
    return cfg


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('release', type=Path, help="folder of the authors' repository")
    add_step_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/authors.json'))
    args = parser.parse_args()
    if not (args.release / 'builder' / 'moco.py').is_file():
        parser.error(f'{args.release} has no builder/moco.py: give the folder of their repository')
    if not 0 < round(args.equi_ratio * args.batch_size) < args.batch_size:
        parser.error(
            f'--equi-ratio {args.equi_ratio} of {args.batch_size} images leaves b1 or b2 empty, '
            'which the release cannot train on; give another one'
        )

    prepare()
    ours = Config.fromfile(ROOT / 'configs/ser_mocov3_vits16_device_views.py')
    with tempfile.TemporaryDirectory() as folder:
        backend = 'nccl' if get_device() == 'cuda' else 'gloo'
        dist.init_process_group(backend, f'file://{folder}/store', rank=0, world_size=1)
        variants = {
            "MMPretrain's MoCo v3": TrainingStep(mmpretrain_config(), args.batch_size),
            'SER, photometry on the device': TrainingStep(ours, args.batch_size, args.equi_ratio),
            "the authors' release": Release(args.release.resolve(), args),
        }
        rows = take_turns(variants, args.steps, args.warmup)
        dist.destroy_process_group()
    about = dict(
        batch_size=args.batch_size,
        b2=round(args.equi_ratio * args.batch_size),
        steps=args.steps,
    )
    report(args.out, about, rows)
    table = [[name, *step_cells(row, args.batch_size)] for name, row in rows.items()]
    print(make_table(STEP_COLUMNS, table))


if __name__ == '__main__':
    main()
