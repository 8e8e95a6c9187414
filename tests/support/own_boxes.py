"""A small COCO data set with classes of its own, and backbones for a detector on it."""

import json

import numpy as np
import torch
from mmpretrain.registry import MODELS
from PIL import Image

CATEGORIES = {7: 'red', 3: 'green', 40: 'blue'}
"""Names by id: neither in order nor without gaps."""
BACKBONE = dict(
    type='SERVisionTransformer',
    arch=dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96),
    img_size=64,
    patch_size=8,
)
QUICK = {
    'model.backbone.arch': BACKBONE['arch'],
    'model.backbone.frozen_stages': 4,
    'model.neck.in_channels': 48,
    # Untrained, it is sure of nothing, and then MMDetection reports nothing.
    'model.test_cfg.rcnn.score_thr': 0.0,
    'train_dataloader.batch_size': 2,
    'test_dataloader.batch_size': 2,
    'train_cfg.max_epochs': 1,
}
"""Options of the config ``faster-rcnn_tiny``, for :data:`BACKBONE` and few images."""


def write_own_boxes(folder, train=4, val=2):
    """Write ``train.json``, ``val.json``, and ``photos`` of noise with coloured boxes."""
    rng = np.random.default_rng(0)
    (folder / 'photos').mkdir(parents=True)
    for split, count in dict(train=train, val=val).items():
        images, annotations = [], []
        for number in range(count):
            pixels = rng.integers(100, size=(64, 64, 3), dtype=np.uint8)
            image = dict(id=100 - number, file_name=f'{split}_{number}.png', width=64, height=64)
            for channel, category in enumerate(CATEGORIES):
                # The last one fills the image, so that a detector that has learned little finds it.
                w, h = (60, 60) if channel == 2 else (24, 20)
                x, y = (int(rng.integers(64 - side)) for side in (w, h))
                pixels[y : y + h, x : x + w, channel] = 255
                box = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, category_id=category)
                annotations.append(dict(box, id=len(annotations) + 1, image_id=image['id']))
            Image.fromarray(pixels).save(folder / 'photos' / image['file_name'])
            images.append(image)
        categories = [dict(id=id, name=name) for id, name in CATEGORIES.items()]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / f'{split}.json').write_text(json.dumps(content))
    return folder


def write_backbone(file, seed, **options):
    """A checkpoint as a pretraining leaves it; returns its weights."""
    torch.manual_seed(seed)
    network = MODELS.build(dict(BACKBONE, **options))
    network.init_weights()
    weights = {f'backbone.{key}': value for key, value in network.state_dict().items()}
    torch.save(dict(state_dict=weights), file)
    return weights
