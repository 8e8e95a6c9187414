"""The training step of the authors' release beside ours: MoCo v3 + SER, ViT-S/16.

The release is not part of this package; fetch it first and say where it is:

    git clone https://github.com/aitrics-chris/SER /path/to/SER
    python benchmarks/authors.py /path/to/SER --batch-size 16 --equi-ratio 0.125

Its step is the one of its training loop, with the settings of its recipe: photometry on the device,
forward, loss, mixed precision, backward, optimizer, DDP and synchronised BatchNorm on one rank, and
the losses that it reads back in every step. Without a GPU the release, written for one, is run on
the CPU by mapping its devices. Ours has its photometry on the device too; beside them is MoCo v3 of
MMPretrain, without photometry. Further arguments are those of step.py.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode


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
        precision (str): Asked for; theirs is float16 on a GPU, whatever that is.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, precision: str) -> None:
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
        self.precision = 'float16' if self.cuda else 'float32'
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


if __name__ == '__main__':
    from step import RELEASE, main

    ours = ["MMPretrain's MoCo v3", 'SER, photometry on the device', RELEASE]
    main(['--out', 'work_dirs/benchmarks/authors.json', '--release', *sys.argv[1:]], ours)
