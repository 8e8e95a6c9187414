"""Images per second that one worker core of the input pipeline makes.

JPEGs of 500 x 375 pixels, ImageNet's median, are written from photographs that scikit-image and
scikit-learn carry. The pipelines of the configs then decode them and make two views, one after the
other in this process: MMPretrain's for MoCo v3, SER's, and SER's with photometry left to the
device. They take turns, image by image.

    python benchmarks/pipeline.py --images 200
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.device import get_device
from mmpretrain.registry import TRANSFORMS
from PIL import Image
from sklearn.datasets import load_sample_images
from step import ROOT, prepare, report

from ser_mm.datasets import EquivariantViewPipeline
from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.results import make_table

SIZE = 500, 375
PIPELINES = {
    "MMPretrain's MoCo v3": 'mocov3_vits16.py',
    'SER': 'ser_mocov3_vits16.py',
    'SER, photometry on the device': 'ser_mocov3_vits16_device_views.py',
}


def write_jpegs(folder: Path) -> list[Path]:
    """Photographs as JPEGs of one size.

    Args:
        folder (Path): Where to write them.

    Returns:
        list[Path]: The files.
    """
    photos = [
        getattr(skimage.data, name)() for name in ('astronaut', 'chelsea', 'coffee', 'rocket')
    ]
    photos += load_sample_images().images
    paths = []
    for i, photo in enumerate(photos):
        paths.append(folder / f'{i}.JPEG')
        Image.fromarray(photo).resize(SIZE, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def photometry_on_device(batch: list[dict], args: argparse.Namespace) -> float:
    """Seconds per image that the preprocessor takes, photometry included, for a whole batch."""
    cfg = Config.fromfile(ROOT / 'configs' / PIPELINES['SER, photometry on the device'])
    preprocessor = build_model(cfg).data_preprocessor.to(get_device())
    data = default_collate(batch)
    cuda = get_device() == 'cuda'
    if cuda:
        data['inputs'] = [x.pin_memory() for x in data['inputs']]
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    seconds = []
    for _ in range(args.repeats + 1):
        synchronize()
        start = time.perf_counter()
        preprocessor(dict(data), training=True)
        synchronize()
        seconds.append((time.perf_counter() - start) / len(batch))
    return statistics.median(seconds[1:])


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=300, help='for each pipeline (default: 300)')
    parser.add_argument(
        '--batch-size', type=int, default=256, help='of the photometry on the device'
    )
    parser.add_argument('--repeats', type=int, default=5, help='of the photometry on the device')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/pipeline.json'))
    args = parser.parse_args()
    prepare()
    warnings.filterwarnings('ignore')  # of mmcv, for every image
    cv2.setNumThreads(0)  # as in a worker, which has one core
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    np.random.seed(0)

    pipelines = {
        name: TRANSFORMS.build(
            dict(type='Compose', transforms=Config.fromfile(ROOT / 'configs' / file).train_pipeline)
        )
        for name, file in PIPELINES.items()
    }
    seconds = {name: [] for name in pipelines}
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder))
        for i in range(-len(paths), args.images):  # the first ones warm up
            for name, pipeline in pipelines.items():
                for views in pipeline.transforms:
                    if isinstance(views, EquivariantViewPipeline):  # as many in b2 as in a run
                        views.in_b2 = i % round(1 / views.equi_ratio) == 0
                start = time.perf_counter()
                sample = pipeline(dict(img_path=str(paths[i % len(paths)])))
                if i >= 0:
                    seconds[name].append(time.perf_counter() - start)
            samples.append(sample)
    rows = {}
    baseline = statistics.mean(next(iter(seconds.values())))
    for name, times in seconds.items():
        mean = statistics.mean(times)
        rows[name] = dict(
            milliseconds=1000 * mean, images_per_second=1 / mean, speedup=baseline / mean
        )
    torch.set_num_threads(threads)
    batch = [samples[i % len(samples)] for i in range(args.batch_size)]
    on_device = photometry_on_device(batch, args)
    about = dict(
        images=args.images,
        size=SIZE,
        batch_size=args.batch_size,
        device_milliseconds_per_image=round(1000 * on_device, 4),
    )
    report(args.out, about, rows)
    table = [
        [
            name,
            f'{row["milliseconds"]:.2f}',
            f'{row["images_per_second"]:.0f}',
            f'{row["speedup"]:.2f}x',
        ]
        for name, row in rows.items()
    ]
    print(make_table(['pipeline', 'ms / image', 'images / s and core', ''], table))


if __name__ == '__main__':
    main()
