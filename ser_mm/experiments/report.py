"""What a pretrained backbone has learned, on one page: figures and pictures."""

import html
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.runner import set_random_seed
from mmpretrain.registry import TRANSFORMS
from PIL import Image
from torch import Tensor

from ser_mm.datasets import LoadChannels
from ser_mm.engine.logs import read_scalars
from ser_mm.evaluation.backbone import build_backbone, start_of, token_maps_of
from ser_mm.evaluation.data import build_loader, spaced_images, spaced_indices
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.features import Embedder
from ser_mm.evaluation.results import make_table
from ser_mm.experiments.demo import token_map, training_views
from ser_mm.experiments.figures import TRANSFORMATIONS, evaluate
from ser_mm.experiments.recipes import list_images
from ser_mm.files import write_text
from ser_mm.visualization import (
    draw_losses,
    draw_neighbours,
    draw_token_maps,
    draw_views,
    restore_images,
)

IMAGES = 450
"""Validation images of R2 and of the pictures, at most."""


def report(cfg: Config, checkpoint: str, out: Path) -> Path:
    """Figures and pictures of a pretrained backbone, on one page.

    Args:
        cfg (Config): What :func:`~ser_mm.experiments.recipes.pretraining_config`
            returned.
        checkpoint (str): The final checkpoint of the run.
        out (Path): Folder of ``report.html``, ``figures.json`` and the pictures.

    Returns:
        Path: The page.
    """
    print('figures and pictures', flush=True)
    pictures, layer, start = out / 'pictures', cfg.model.algorithm.backbone.ser_layer, start_of(cfg)
    draw_losses({'pretraining': read_scalars(cfg.work_dir)}, pictures / 'losses.png')
    views, preprocessor = training_views(cfg)
    draw_views(views, lambda x: restore_images(x, preprocessor), pictures / 'views.png')

    preprocessor, _ = build_loader(cfg, 'val')
    images = torch.cat(list(spaced_images(cfg, 'val', IMAGES)))
    draw_token_maps(
        {'pretrained': token_map(cfg, checkpoint, layer), start: token_map(cfg, None, layer)},
        images,
        lambda x: restore_images(x, preprocessor),
        pictures / 'token_maps.png',
    )
    val = list_images(cfg.evaluation.val)
    files = [val.get_data_info(i)['img_path'] for i in spaced_indices(len(val), IMAGES)]
    embedder = Embedder(cfg, checkpoint)
    features = torch.nn.functional.normalize(embedder.embed(files), dim=1)
    nearest = (features @ features.T).topk(min(6, len(files)), dim=1).indices.tolist()
    chosen = spaced_indices(len(files), 6)
    load = TRANSFORMS.build(cfg.evaluation.val.pipeline[0])
    draw_neighbours(
        [[_thumbnail(files[j], load) for j in nearest[i]] for i in chosen],
        pictures / 'neighbours.png',
    )

    before = deepcopy(cfg)
    before.work_dir = str(out / 'start')
    found = _measure(cfg, checkpoint, images) | dict(before=_measure(before, None, images))
    write_text(out / 'figures.json', json.dumps(found, indent=1))
    page = out / 'report.html'
    summary = _summary({start: found['before'], 'pretrained': found}, layer)
    write_text(page, _page(cfg, summary, layer))
    print(f'{summary}\n{page} shows it.', flush=True)
    return page


def _measure(cfg: Config, checkpoint: str | None, images: Tensor) -> dict[str, Any]:
    """Figures of a network, or of what a run starts from; accuracies where there are labels."""
    if cfg.evaluation.val.with_label:
        return evaluate(cfg, checkpoint, IMAGES)
    set_random_seed(cfg.randomness.seed)
    with token_maps_of(build_backbone(cfg, checkpoint)) as token_maps:
        return dict(layers=equivariance_by_layer(token_maps, [images], TRANSFORMATIONS))


def _thumbnail(file: str, load: BaseTransform) -> Image.Image:
    pixels = load(dict(img_path=file))['img']
    pixels = pixels.clip(0, 255).astype(np.uint8)
    if isinstance(load, LoadChannels):
        # As restore_images shows them.
        pixels = pixels[..., :3] if load.channels > 2 else pixels[..., :1].repeat(3, axis=2)
    has_bgr = not isinstance(load, LoadChannels) or load.channels == 3
    small = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1] if has_bgr else pixels))
    small.thumbnail((128, 128))
    return small


def _summary(networks: Mapping[str, Mapping[str, Any]], layer: int) -> str:
    """A table in Markdown of what was measured, a column for each network."""
    titles = dict(probe='linear probe', probe_turned='linear probe, turned images', knn='k-NN')
    figures = {
        titles[key]: [found[key] for found in networks.values()]
        for key in titles
        if all(key in found for found in networks.values())
    }
    maps = [found['layers']['mixture'] for found in networks.values()]
    figures[f'R2 after block {layer}'] = [x[layer - 1]['r2'] for x in maps]
    figures['R2 after the last block'] = [x[-1]['r2'] for x in maps]
    rows = [[title, *(f'{x:.3f}' for x in values)] for title, values in figures.items()]
    return make_table(['on validation images', *networks], rows)


def _page(cfg: Config, summary: str, layer: int) -> str:
    captions = {
        'losses': 'Losses over the steps: of the algorithm, and of SER.',
        'views': 'Views that the network was trained on.',
        'neighbours': 'Left, a validation image; right of it, those whose features are nearest.',
        'token_maps': f'Token maps after block {layer}, in the colours of their three principal '
        'components. The last two of a row are equal where the map is equivariant.',
    }
    shown = ''.join(
        f'<h2>{html.escape(text)}</h2><img src="pictures/{name}.png" style="max-width:100%">'
        for name, text in captions.items()
    )
    about = (
        f'{cfg.model.algorithm.type} with SER, {cfg.train_cfg.max_epochs} epochs of images in '
        f'{cfg.train_dataloader.dataset.data_root}'
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>Pretraining with SER</title>'
        '<body style="font-family:sans-serif;max-width:60em;margin:2em auto">'
        f'<h1>{html.escape(about)}</h1><pre>{html.escape(summary)}</pre>{shown}'
    )
