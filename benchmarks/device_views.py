"""Images per second of whole view policies on the device, beside MMPretrain's pipeline.

Images of one size, pieces of photographs that scikit-image and scikit-learn carry, are kept as
bytes in memory. MMPretrain's pipeline makes two views of each, one after the other, in as many
processes as there are cores; the preprocessor of SER makes them of whole batches, on the device
that there is, with and without b2. Loading the images and collating them is part of both, but for
images that are there: batches in the memory of the device. They take turns, and times are medians
over the rounds.

    python benchmarks/device_views.py --size 64 --cores 2
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from mmengine.dataset import default_collate
from mmengine.device import get_device
from mmpretrain.registry import TRANSFORMS
from sklearn.datasets import load_sample_images
from step import prepare, report
from torch.utils.data import DataLoader, Dataset

from ser_mm.evaluation.results import make_table
from ser_mm.models import SERDataPreprocessor

PIXELS = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def policy(size: int, blur: bool) -> list[list[dict]]:
    """MoCo v3's two views, with bicubic crops."""
    crop = dict(
        type='RandomResizedCrop',
        scale=size,
        crop_ratio_range=(0.2, 1.0),
        backend='pillow',
        interpolation='bicubic',
    )
    jitter = dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    weights = (0.114, 0.587, 0.2989)
    color = [
        dict(type='RandomApply', transforms=[jitter], prob=0.8),
        dict(type='RandomGrayscale', prob=0.2, keep_channels=True, channel_weights=weights),
    ]
    blurs = [
        [dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_std='inf', prob=p)] * blur
        for p in (1.0, 0.1)
    ]
    flip = dict(type='RandomFlip', prob=0.5)
    solarize = dict(type='Solarize', thr=128, prob=0.2)
    return [[crop, *color, *blurs[0], flip], [crop, *color, *blurs[1], solarize, flip]]


class Images(Dataset):
    """Images in memory, through transforms."""

    def __init__(self, images: np.ndarray, transforms: list[dict]) -> None:
        self.images = images
        self.transforms = TRANSFORMS.build(dict(type='Compose', transforms=transforms))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        image = self.images[index].copy()
        return self.transforms(dict(img=image, img_shape=image.shape[:2]))


def cut(n: int, size: int) -> np.ndarray:
    """Pieces of photographs, (n, size, size, 3)."""
    rng = np.random.default_rng(0)
    photos = [
        getattr(skimage.data, name)() for name in ('astronaut', 'chelsea', 'coffee', 'rocket')
    ]
    photos = [
        cv2.resize(photo, None, fx=0.5, fy=0.5) for photo in photos + load_sample_images().images
    ]
    pieces = []
    for i in range(n):
        photo = photos[i % len(photos)]
        top, left = (rng.integers(side - size + 1) for side in photo.shape[:2])
        pieces.append(photo[top : top + size, left : left + size])
    return np.stack(pieces)


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, default=64, help='of images and views (default: 64)')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--batches', type=int, default=4, help='per round (default: 4)')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--cores', type=int, default=1, help='processes, or threads of the device')
    parser.add_argument('--equi-ratio', type=float, default=1 / 16, help='share of b2')
    parser.add_argument('--no-blur', action='store_true', help='as is common for small images')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/device_views.json'))
    args = parser.parse_args()
    prepare()
    warnings.filterwarnings('ignore')  # of mmcv, for every image
    cv2.setNumThreads(0)  # as in a worker, which has one core
    torch.set_num_threads(args.cores)

    images = cut(args.batch_size * args.batches, args.size)
    views = policy(args.size, not args.no_blur)
    pack = dict(type='PackInputs')
    multi_view = dict(type='MultiView', num_views=[1, 1], transforms=views)
    crops = [[view[0]] for view in views]

    def loader(transforms: list[dict]) -> DataLoader:
        # The main process is one of the cores, where it waits for others it is none.
        workers = dict(num_workers=args.cores, persistent_workers=True) if args.cores > 1 else {}
        data = Images(images, transforms)
        return DataLoader(data, args.batch_size, collate_fn=default_collate, **workers)

    def preprocessor(views: list[list[dict]], ratio: float | None) -> SERDataPreprocessor:
        options = dict(views=views, equi_ratio=ratio, patch_size=1, **PIXELS)
        return SERDataPreprocessor(**options).to(get_device())

    plain = DataLoader(Images(images, [pack]), args.batch_size, collate_fn=default_collate)
    there = [dict(batch, inputs=batch['inputs'].to(get_device())) for batch in plain]
    variants = {
        "MMPretrain's pipeline": (loader([multi_view, pack]), None),
        'on the device': (plain, preprocessor(views, None)),
        'on the device, with b2': (plain, preprocessor(views, args.equi_ratio)),
        'on the device, with b2, images there': (there, preprocessor(views, args.equi_ratio)),
        'on the device, crops alone': (plain, preprocessor(crops, None)),
        'loading images alone': (plain, None),
    }
    synchronize = torch.cuda.synchronize if get_device() == 'cuda' else lambda: None
    seconds = {name: [] for name in variants}
    for index in range(-1, args.rounds):  # the first one warms up
        for name, (batches, preprocess) in variants.items():
            synchronize()
            start = time.perf_counter()
            for batch in batches:
                if preprocess is not None:
                    preprocess(batch, training=True)
            synchronize()
            if index >= 0:
                seconds[name].append((time.perf_counter() - start) / len(images))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = medians["MMPretrain's pipeline"]
    rows = {
        name: dict(
            milliseconds=1000 * median, images_per_second=1 / median, speedup=baseline / median
        )
        for name, median in medians.items()
    }
    about = {k: v for k, v in vars(args).items() if k != 'out'}
    report(args.out, about, rows)
    table = [
        [
            name,
            f'{row["milliseconds"]:.3f}',
            f'{row["images_per_second"]:.0f}',
            f'{row["speedup"]:.2f}x',
        ]
        for name, row in rows.items()
    ]
    print(make_table(['two views', 'ms / image', 'images / s', ''], table))


if __name__ == '__main__':
    main()
