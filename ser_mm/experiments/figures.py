"""What is measured of a pretraining run, once, and kept beside it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor

from ser_mm.evaluation.backbone import token_maps_of, weights_of
from ser_mm.evaluation.data import build_loader, dataset_of, spaced_images
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.features import CachedFeatures, stamp_images
from ser_mm.evaluation.knn import knn_probe
from ser_mm.evaluation.linear import choose_solver, fit_classifier
from ser_mm.files import read_kept, write_text

ACCURACIES = ('probe', 'probe_turned', 'knn')
TRANSFORMATIONS = ('rot90', 'flip_lr', 'scale', 'mixture')


def evaluate(
    cfg: Config,
    checkpoint: str | None,
    images: int = 450,
    num_workers: int = 0,
    solver: str | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Figures of a network, kept as JSON beside the folder of its run.

    They are measured again when the checkpoint, the settings or the images are others, or when
    the file cannot be read.

    Args:
        cfg (Config): Config of the run, with ``work_dir``, ``randomness`` and ``evaluation``.
        checkpoint (str, optional): Its final checkpoint. None for the untrained network.
        images (int): Validation images that R2 is measured on, at most. Defaults to 450.
        num_workers (int): Processes that read images. Defaults to 0.
        solver (str, optional): Of the linear probe, see
            :func:`~ser_mm.evaluation.linear.linear_probe`. Defaults to None: what
            :func:`~ser_mm.evaluation.linear.choose_solver` says.
        data (str, optional): What :func:`stamp_data` returned, if it is known. Defaults to None.

    Returns:
        dict[str, Any]: Accuracies ``probe``, ``probe_turned``, of the same probe on validation
        images that :class:`~ser_mm.datasets.MoveByD4` has moved, and ``knn``; and ``layers``, the
        scores of all blocks by transformation, see
        :func:`~ser_mm.evaluation.equivariance.equivariance_by_layer`.
    """
    file = Path(f'{cfg.work_dir}.json')
    cache = Path(f'{cfg.work_dir}.features')  # for an interruption: those of ImageNet take long
    about = _about(cfg, checkpoint, images, solver) | dict(data=data or stamp_data(cfg))
    kept = read_kept(file, read_figures)
    if kept and kept.pop('about') == about:
        shutil.rmtree(cache, ignore_errors=True)  # of one that was killed at its end
        return kept
    set_random_seed(cfg.randomness.seed)  # of the untrained network
    cfg = deepcopy(cfg)
    cfg.evaluation.val_turned = turned(dataset_of(cfg, 'val'))
    source = CachedFeatures(cfg, checkpoint, cache, num_workers=num_workers)
    found, _ = accuracies(source, solver)
    with token_maps_of(source.network.backbone) as token_maps:
        batches = spaced_images(cfg, 'val', images, num_workers=num_workers)
        found['layers'] = equivariance_by_layer(token_maps, batches, TRANSFORMATIONS)
    write_text(file, json.dumps(dict(found, about=about), indent=1))
    shutil.rmtree(cache, ignore_errors=True)
    return found


def accuracies(
    source: CachedFeatures, solver: str | None = None
) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """Accuracies of a network, and the linear probe.

    Args:
        source (CachedFeatures): Network and data sets ``train``, ``val`` and ``val_turned``.
        solver (str, optional): See :func:`evaluate`. Defaults to None.

    Returns:
        tuple: :data:`ACCURACIES` by name, and what gives the classes (N,) of features (N, C).
    """
    train, train_labels = source.load('train')
    sets = dict(probe=source.load('val'), probe_turned=source.load('val_turned'))
    solver = solver or choose_solver(len(train))
    classify = fit_classifier(train, train_labels, solver=solver, cache_dir=source.cache_dir)
    found: dict[str, Any] = {
        key: float((classify(features) == labels).double().mean())
        for key, (features, labels) in sets.items()
    }
    return found | dict(knn=knn_probe(train, train_labels, *sets['probe'])), classify


def stamp_data(cfg: Config) -> str:
    """A digest of the images that figures are measured on: paths, labels, sizes, times of change.

    Args:
        cfg (Config): Config of a run, with ``evaluation``.
    """
    digest = hashlib.sha256()
    for split in ('train', 'val'):
        _, loader = build_loader(cfg, split)
        digest.update('\n'.join([split, *stamp_images(loader.dataset)]).encode())
    return digest.hexdigest()


def read_figures(file: Path) -> dict[str, Any]:
    """Read figures that :func:`evaluate` has kept.

    Args:
        file (Path): Their file.

    Returns:
        dict[str, Any]: The figures, and ``about``, what they depend on.

    Raises:
        Exception: Of any type, if the file holds anything else.
    """
    kept = json.loads(file.read_text())
    whole = isinstance(kept['about'], dict) and all(
        isinstance(layer[key], float | int)
        for moves in TRANSFORMATIONS
        for layer in (kept['layers'][moves] or [{}])
        for key in ('r2', 'retrieval')
    )
    if not whole or not all(isinstance(kept[key], float | int) for key in ACCURACIES):
        raise ValueError('it holds no figures')
    return kept


def turned(dataset: dict) -> dict:
    """The config of a data set whose images are turned and flipped, right before packing.

    Args:
        dataset (dict): Config of it, with a pipeline.
    """
    *steps, pack = dataset['pipeline']
    return dict(dataset, pipeline=[*steps, dict(type='MoveByD4'), pack])


def _about(cfg: Config, checkpoint: str | None, images: int, solver: str | None) -> dict[str, Any]:
    """What figures depend on."""
    if checkpoint:
        content = Path(checkpoint).read_bytes()
    else:
        content = repr(cfg.randomness).encode()
        for weights in weights_of(cfg):  # which may be others under the same name
            content += Path(weights).read_bytes() if Path(weights).is_file() else b''
    settings = repr((cfg.evaluation, cfg.model, cfg.get('data_preprocessor')))
    about = dict(
        checkpoint=hashlib.sha256(content).hexdigest(),
        settings=hashlib.sha256(settings.encode()).hexdigest(),
        images=images,
    )
    return about | (dict(solver=solver) if solver else {})


def at_layer(found: dict[str, Any], layer: int) -> dict[str, Any]:
    """Figures with R2 and retrieval under 'mixture' at a block and at the last one.

    Args:
        found (dict[str, Any]): What :func:`evaluate` returned.
        layer (int): Block, counted from 1.

    Returns:
        dict[str, Any]: With ``r2``, ``r2_last``, ``retrieval`` and ``retrieval_last`` too.
    """
    mixture = found['layers']['mixture']
    scores = {}
    for key in ('r2', 'retrieval'):
        scores[key] = mixture[layer - 1][key]
        scores[f'{key}_last'] = mixture[-1][key]
    return {**found, **scores}
