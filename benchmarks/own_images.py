"""Listing of many images: as files in a folder of classes, in a list, and in tar archives.

Images are generated: hard links to copies of one, so that a million take a few MB and as many
entries of folders; the archives hold copies. Each reading is in a process of its own, in turns:

    python benchmarks/own_images.py --images 1000000 --folder /tmp/many

Seconds of the processor, which others that are at work change little, to list all (the data set
ImageSource, ready to be read), once more in the same process, and to make the config of a
pretraining; memory of the process, and of what was kept. Beside it the paths of all files, by
os.walk.
"""

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from memory import memory
from PIL import Image
from step import prepare, report

from ser_mm.datasets import ImageSource
from ser_mm.evaluation.results import make_table
from ser_mm.experiments.recipes import pretraining_config

SOURCES = {'folder': 'folder', 'list': 'list.txt', 'tar': 'shards'}
WALK = 'os.walk'
_CLASS, _SHARD = 1000, 10_000
_LINKS = 50_000  # of a file; ext4 has 65,000


def generate(folder: Path, images: int) -> None:
    """Write what is not there."""
    done = folder / f'{images}.done'
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f'error: {folder} holds something else; name a new folder.')
    copies = []
    for number in range(-(-images // _LINKS)):
        copies.append(folder / f'.{number}.jpg')
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(copies[-1])
    for number in range(images):
        place = folder / 'folder' / f'class {number // _CLASS:04}'
        if number % _CLASS == 0:
            place.mkdir(parents=True)
        os.link(copies[number // _LINKS], place / f'{number:07}.jpg')
    with open(folder / 'list.txt', 'w') as file:
        for i in range(images):
            file.write(f'folder/class {i // _CLASS:04}/{i:07}.jpg {i // _CLASS}\n')
    (folder / 'shards').mkdir()
    content = copies[0].read_bytes()
    for start in range(0, images, _SHARD):
        with tarfile.open(folder / 'shards' / f'{start:07}.tar', 'w') as shard:
            for i in range(start, min(start + _SHARD, images)):
                member = tarfile.TarInfo(f'class {i // _CLASS:04}/{i:07}.jpg')
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    done.touch()


def read(source: str, folder: Path) -> dict[str, float]:
    """One reading, in this process."""
    prepare()
    start, began = memory('VmRSS'), time.process_time()
    if source == WALK:
        kept = [
            os.path.join(x, name) for x, _, names in os.walk(folder / 'folder') for name in names
        ]
        return dict(images=len(kept), first=time.process_time() - began, peak=memory('VmHWM'))
    place = folder / SOURCES[source]
    data = ImageSource(place, with_label=True)
    found = dict(images=len(data), first=time.process_time() - began, peak=memory('VmHWM'))
    gc.collect()
    found['kept'] = memory('VmRSS') - start
    began = time.process_time()
    ImageSource(place, with_label=True)
    found['again'] = time.process_time() - began
    rng = np.random.default_rng(0)
    began = time.process_time()
    for i in rng.integers(len(data), size=10_000):
        data.get_data_info(int(i))
    found['item'] = (time.process_time() - began) / 10_000
    began = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        pretraining_config(place, out, model='vit_tiny_patch16', image_size=64, batch_size=4)
    found['config'] = time.process_time() - began
    found['start'] = start
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=100_000, help='(default: 100000)')
    parser.add_argument('--rounds', type=int, default=3, help='of which medians are (default: 3)')
    parser.add_argument(
        '--folder', type=Path, required=True, help='of the images; it and they are kept'
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmarks/own_images.json'))
    parser.add_argument('--only', choices=[WALK, *SOURCES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(read(args.only, args.folder)))
        return
    generate(args.folder, args.images)
    readings: dict[str, list[dict]] = {name: [] for name in (WALK, *SOURCES)}
    for _ in range(args.rounds):
        for name, found in readings.items():
            command = [sys.executable, __file__, '--folder', str(args.folder), '--only', name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f'{name}: {found[-1]}', file=sys.stderr, flush=True)
    rows = {
        name: {key: statistics.median(x[key] for x in found) for key in found[0]}
        for name, found in readings.items()
    }
    for row in rows.values():
        row['ratio'] = row['first'] / rows[WALK]['first']
    report(args.out, dict(images=args.images, rounds=args.rounds), rows)
    table = []
    for name, row in rows.items():
        cells = [f'{row["first"]:.2f}', f'{row["ratio"]:.1f}x', f'{row["peak"]:.0f}']
        if name != WALK:
            cells += [
                f'{row[key]:.{digits}f}'
                for key, digits in (('kept', 0), ('again', 2), ('config', 2))
            ]
            cells.append(f'{1e6 * row["item"]:.0f}')
        table.append([name, *cells, *['-'] * (7 - len(cells))])
    titles = ['', 's to list', 'ratio', 'MiB at the peak', 'MiB kept', 's again', 's to a config']
    print(make_table([*titles, 'us an item'], table))


if __name__ == '__main__':
    main()
