"""What one core makes of images: views an image, stage by stage, beside what bounds them.

The files of a folder, or JPEGs of 300 to 700 pixels a side written from photographs that
scikit-image and scikit-learn carry, are decoded and made into batches of two views by one process
on one core: by MMPretrain's pipeline for MoCo v3, by those of SER's configs, and by no pipeline at
all, decoding and two crops, which is the floor. They take turns, batch by batch. Figures are
medians of the rounds, ratios those of the ratios within a round; collating is included.

Warm files are in memory, and their time is that of the processor, whoever else uses it. Cold files
are put out of memory before each batch, as far as the system obeys, and their time is the clock's.

    python benchmarks/pipeline.py --data /path/to/images --gpu-images-per-second 2000
"""

import argparse
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import mmcv
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform, RandomApply
from mmengine.config import Config
from mmengine.device import get_device
from mmpretrain.datasets.transforms import RandomResizedCrop
from mmpretrain.registry import TRANSFORMS
from PIL import Image
from sklearn.datasets import load_sample_images
from step import ROOT, prepare, processor, report

from ser_mm.datasets import EquivariantViewPipeline, default_collate
from ser_mm.datasets.image_source import SUFFIXES, check_images, iterate_images, part_of
from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.results import make_table

SIDES = 300, 700
CROP = RandomResizedCrop(224)  # of MoCo v3: draws the boxes of the floor
FLOOR = 'decoding and two crops'
THEIRS = "MMPretrain's MoCo v3"
DEVICE = 'SER, photometry on the device'
CONFIGS = {
    THEIRS: 'mmpretrain::mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.py',
    'baseline': 'mocov3_vits16.py',
    'SER': 'ser_mocov3_vits16.py',
    DEVICE: 'ser_mocov3_vits16_device_views.py',
}
# A step of Barlow Twins, ViT-S/16, two views, bf16, on one H200, without its input pipeline:
# benchmarks/imagenet10/RESULTS.md of stable-pretraining.
H200 = 2683


def write_jpegs(folder: Path, images: int) -> None:
    """Photographs as JPEGs of many sizes.

    Args:
        folder (Path): Where to write them.
        images (int): How many.
    """
    photos = [
        getattr(skimage.data, name)() for name in ('astronaut', 'chelsea', 'coffee', 'rocket')
    ]
    photos += load_sample_images().images
    sides = np.random.default_rng(0).integers(SIDES[0], SIDES[1], (images, 2), endpoint=True)
    for i, size in enumerate(sides.tolist()):
        photo = Image.fromarray(photos[i % len(photos)])
        photo.resize(size, Image.Resampling.BICUBIC).save(folder / f'{i}.jpg', quality=90)
    os.sync()  # what is not on the disk yet cannot be put out of memory


def find_images(data: Path, images: int) -> list[str]:
    """Readable images, spread over a folder or a list.

    Args:
        data (Path): Folder, or text file that lists images.
        images (int): How many at most.

    Returns:
        list[str]: Paths.

    Raises:
        OSError: If there are none.
        ValueError: If ``data`` is another kind of file, or none can be read.
    """
    check_images(data)
    paths = [path for path, _ in iterate_images(part_of(data, 'train')[0], SUFFIXES, False)]
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:images]]
    readable = [path for path in paths if decode(path) is not None]
    if len(readable) < len(paths):
        print(f'{len(paths) - len(readable)} files cannot be read as images, and are left out.')
    if not readable:
        raise ValueError(f'{data}: none of {len(paths)} files can be read as an image.')
    return readable


def forget(paths: Iterable[str]) -> None:
    """Put files out of the memory of the system, where it can be asked to."""
    if hasattr(os, 'posix_fadvise'):
        for path in paths:
            with open(path, 'rb') as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(path: str) -> np.ndarray:
    """What every pipeline does first, without what is around it."""
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)


def two_crops(path: str) -> list[torch.Tensor]:
    """Crops as torchvision makes them of uint8 images."""
    image = decode(path)
    crops = []
    for _ in range(2):
        top, left, height, width = CROP.rand_crop_params(image)
        box = torch.from_numpy(image[top : top + height, left : left + width])[None]
        box = box.permute(0, 3, 1, 2)
        crops.append(F.interpolate(box, CROP.scale, mode=CROP.interpolation, antialias=True))
    return crops


class Pipeline:
    """The training pipeline of a config, batches of it, and where their time goes."""

    def __init__(self, name: str) -> None:
        path = CONFIGS[name]
        text = f'_base_ = [{path!r}]'
        cfg = (
            Config.fromstring(text, '.py')
            if '::' in path
            else Config.fromfile(ROOT / 'configs' / path)
        )
        transforms = cfg.train_dataloader.dataset.pipeline
        self.pipeline = TRANSFORMS.build(dict(type='Compose', transforms=transforms))
        self.watched = TRANSFORMS.build(dict(type='Compose', transforms=transforms))
        self.seconds: Counter[str] = Counter()
        for transform in self.watched.transforms:
            self._watch(transform)

    def samples(self, paths: list[str], watched: bool = False) -> list[dict]:
        """The views of images, as many of them in b2 as in a run."""
        pipeline = self.watched if watched else self.pipeline
        views = next((x for x in pipeline.transforms if hasattr(x, 'equi_ratio')), None)
        out = []
        for i, path in enumerate(paths):
            if isinstance(views, EquivariantViewPipeline):
                views.in_b2 = i % round(1 / views.equi_ratio) == 0
            out.append(pipeline(dict(img_path=path)))
        return out

    def __call__(self, paths: list[str]) -> dict:
        """A batch."""
        return default_collate(self.samples(paths))

    def stages(self, paths: list[str]) -> dict[str, float]:
        """Milliseconds an image of each transform, and of collating."""
        self.seconds.clear()
        samples = self.samples(paths, watched=True)
        start = time.process_time()
        default_collate(samples)
        self.seconds['collating'] += time.process_time() - start
        return {stage: 1000 * s / len(paths) for stage, s in self.seconds.items()}

    def _watch(self, transform: BaseTransform) -> None:
        """Let a transform add its time, without that of those inside of it, to its stage."""
        inner = [
            x
            for views in vars(transform).values()
            for view in (views if isinstance(views, list) else [views])
            for x in getattr(view, 'transforms', ())
        ]
        for x in inner:
            self._watch(x)
        stage = type(transform).__name__.removeprefix('Fast')
        if inner and not isinstance(transform, RandomApply):
            stage = 'rest of the views'
        work = vars(transform).get('transform') or transform.transform
        if getattr(work, 'watched', False):
            return

        def timed(results: dict) -> dict:
            start, before = time.process_time(), sum(self.seconds.values())
            out = work(results)
            inside = sum(self.seconds.values()) - before
            self.seconds[stage] += time.process_time() - start - inside
            return out

        timed.watched = True
        transform.transform = timed


def photometry_on_device(pipeline: Pipeline, paths: list[str], repeats: int) -> float:
    """Milliseconds an image that the preprocessor takes for a batch, photometry included."""
    cfg = Config.fromfile(ROOT / 'configs' / CONFIGS[DEVICE])
    preprocessor = build_model(cfg).data_preprocessor.to(get_device())
    data = pipeline(paths)
    cuda = get_device() == 'cuda'
    if cuda:
        data['inputs'] = [x.pin_memory() for x in data['inputs']]
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        preprocessor(dict(data), training=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[1:]) / len(paths)


def measure(
    variants: dict[str, Callable], paths: list[str], batch: int, rounds: int, cold: bool
) -> dict[str, list[float]]:
    """Milliseconds an image of each variant in each round.

    Args:
        variants (dict[str, Callable]): Each takes a list of paths.
        paths (list[str]): Images.
        batch (int): Images that a variant takes before it is the turn of the next.
        rounds (int): Times that each variant takes all images, after a first one, which warms up.
        cold (bool): Put files out of memory before.
    """
    clock = time.perf_counter if cold else time.process_time
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-1, rounds):
        total = dict.fromkeys(variants, 0.0)
        for first in range(0, len(paths), batch):
            part = paths[first : first + batch]
            for name, variant in variants.items():
                if cold:
                    forget(part)
                start = clock()
                variant(part)
                total[name] += clock() - start
        for name, seconds in total.items():
            if turn >= 0:
                found[name].append(1000 * seconds / len(paths))
    return found


def summarize(warm: dict, cold: dict, speed: float) -> dict[str, dict]:
    """Medians, ratios of rounds, and the cores that feed a GPU, of each variant."""

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(warm[name], warm[other], strict=True))

    return {
        name: dict(
            milliseconds=statistics.median(times),
            cold_milliseconds=statistics.median(cold[name]),
            images_per_second=1000 / statistics.median(times),
            of_floor=ratio(name, FLOOR),
            of_mmpretrain=ratio(name, THEIRS),
            cores=math.ceil(speed * statistics.median(times) / 1000),
        )
        for name, times in warm.items()
    }


def main() -> None:
    """Measure, print tables, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data', type=Path, help='folder or list of images (default: generated)')
    parser.add_argument('--images', type=int, default=128, help='at most (default: 128)')
    parser.add_argument('--batch-size', type=int, default=32, help='images (default: 32)')
    parser.add_argument('--rounds', type=int, default=5, help='of all images (default: 5)')
    parser.add_argument(
        '--gpu-images-per-second',
        type=float,
        default=H200,
        help=f'that the views are for (default: {H200}, published for ViT-S/16 on an H200)',
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/pipeline.json'))
    args = parser.parse_args()
    for name in ('images', 'batch_size', 'rounds', 'gpu_images_per_second'):
        if getattr(args, name) <= 0:
            parser.error(f'--{name.replace("_", "-")} must be above 0')
    prepare()
    warnings.filterwarnings('ignore')  # of mmcv, for every image
    cv2.setNumThreads(0)  # as in a worker, which has one core
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    np.random.seed(0)

    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            write_jpegs(Path(folder), args.images)
        try:
            paths = find_images(args.data or Path(folder), args.images)
        except (OSError, ValueError) as error:
            parser.error(f'--data: {error}')
        pipelines = {name: Pipeline(name) for name in CONFIGS}
        variants = {
            'decoding alone': lambda part: list(map(decode, part)),
            FLOOR: lambda part: list(map(two_crops, part)),
            **pipelines,
        }
        turns = args.batch_size, args.rounds
        warm = measure(variants, paths, *turns, cold=False)
        cold = measure(variants, paths, *turns, cold=True)
        stages = {name: [] for name in pipelines}
        for _ in range(args.rounds):
            for name, pipeline in pipelines.items():
                stages[name].append(pipeline.stages(paths))
        sides = [decode(path).shape[:2] for path in paths]
        size = sum(os.path.getsize(path) for path in paths) / len(paths)
        torch.set_num_threads(threads)
        on_device = photometry_on_device(pipelines[DEVICE], paths[: args.batch_size], args.rounds)

    rows = summarize(warm, cold, args.gpu_images_per_second)
    for name, times in stages.items():
        rows[name]['stages'] = {
            stage: round(statistics.median(x.get(stage, 0.0) for x in times), 4)
            for stage in dict.fromkeys(stage for x in times for stage in x)
        }
    about = dict(
        processor=processor(),
        images=len(paths),
        mean_height=round(statistics.mean(h for h, _ in sides)),
        mean_width=round(statistics.mean(w for _, w in sides)),
        mean_kilobytes=round(size / 1000),
        batch_size=args.batch_size,
        rounds=args.rounds,
        gpu_images_per_second=args.gpu_images_per_second,
        device_milliseconds_per_image=round(on_device, 4),
        opencv=cv2.__version__,
        mmcv=mmcv.__version__,
    )
    report(args.out, about, rows)
    table = [
        [
            name,
            f'{row["milliseconds"]:.2f}',
            f'{row["cold_milliseconds"]:.2f}',
            f'{row["of_floor"]:.2f}x',
            f'{row["of_mmpretrain"]:.2f}x',
            f'{row["images_per_second"]:.0f}',
            row['cores'],
        ]
        for name, row in rows.items()
    ]
    needed = f'cores for {args.gpu_images_per_second:g} images/s'
    columns = [
        'one core',
        'ms / image',
        'cold',
        'of floor',
        "of MMPretrain's",
        'images / s',
        needed,
    ]
    print(make_table(columns, table), end='\n\n')
    names = dict.fromkeys(stage for name in stages for stage in rows[name]['stages'])
    table = [
        [stage, *(f'{rows[name]["stages"].get(stage, 0):.3f}' for name in stages)]
        for stage in names
    ]
    print(make_table(['stage, ms / image', *stages], table))


if __name__ == '__main__':
    main()
