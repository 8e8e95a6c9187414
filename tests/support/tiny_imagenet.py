"""Tiny ImageNet's layout, with images of noise."""

import numpy as np
from PIL import Image


def write_tiny_imagenet(root, classes=3, per_class=4):
    """Write as many images of each class to train on, and one of each to validate on."""
    rng = np.random.default_rng(0)
    names = [f'n{10 * (classes - c):08d}' for c in range(classes)]  # not in order, as there
    wanted = [(f'train/{x}', f'{x}_{n}', x) for x in names for n in range(per_class)]
    wanted += [('val', f'val_{n}', name) for n, name in enumerate(names[::-1])]
    root.mkdir(parents=True, exist_ok=True)
    (root / 'wnids.txt').write_text(''.join(f'{name}\n' for name in names))
    for folder, image, name in wanted:
        (root / folder / 'images').mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / folder / 'images' / f'{image}.JPEG')
        box = '\t'.join(map(str, [*rng.integers(30, size=2), *rng.integers(33, 64, size=2)]))
        train = folder != 'val'
        notes = root / folder / (f'{name}_boxes.txt' if train else 'val_annotations.txt')
        with notes.open('a') as file:
            file.write(f'{image}.JPEG\t{box}\n' if train else f'{image}.JPEG\t{name}\t{box}\n')
    return root
