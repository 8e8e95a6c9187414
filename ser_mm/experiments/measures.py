"""Everything that is measured of a run, measure by measure, each kept beside it."""

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor

from ser_mm.engine.logs import read_scalars
from ser_mm.engine.operators import require_operators
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.cost import count_step
from ser_mm.evaluation.data import build_loader, dataset_of, spaced_images, spaced_indices
from ser_mm.evaluation.dense import AFFINE, measure_dense, summarize_angles
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.metrics import rank_me
from ser_mm.evaluation.robustness import CORRUPTIONS, corrupted_datasets
from ser_mm.experiments.boxes import box_map
from ser_mm.experiments.figures import TRANSFORMATIONS, accuracies, turned
from ser_mm.files import digest_file, read_kept, write_text

MEASURES = ('accuracy', 'corruptions', 'equivariance', 'dense', 'cost', 'boxes')
VERSIONS = dict(corruptions=2)
"""Those of measures that have changed; what was kept of another one is taken again."""


def measure(
    cfg: Config,
    checkpoint: str | None,
    layer: int,
    measures: Sequence[str],
    data: str,
    images: int = 1000,
    num_workers: int = 0,
    solver: str | None = None,
) -> dict[str, Any]:
    """What a run is worth, measure by measure, each kept beside the folder of the run.

    A measure is taken again where the weights, the settings or the images are others.

    Args:
        cfg (Config): Config of the run, with ``work_dir``, ``randomness`` and ``evaluation``.
        checkpoint (str, optional): Its final checkpoint. None for the untrained network.
        layer (int): Block that SER is at, or would be, counted from 1.
        measures (Sequence[str]): Of :data:`MEASURES`.
        data (str): What :func:`~ser_mm.experiments.figures.stamp_data` returned.
        images (int): Validation images, at most, of each corruption and of what is measured on
            token maps. Defaults to 1000.
        num_workers (int): Processes that read images. Defaults to 0.
        solver (str, optional): Of the linear probe. Defaults to None, see
            :func:`~ser_mm.experiments.figures.evaluate`.

    Returns:
        dict[str, Any]: By name of the figure, those of all measures that are kept.
    """
    network = _Network(cfg, checkpoint, layer, images, num_workers, solver)
    file = Path(f'{cfg.work_dir}.measures.json')
    digest = network.weights.copy()
    digest.update(repr((cfg.evaluation, layer)).encode())
    about = dict(digest=digest.hexdigest(), data=data, images=images, solver=solver)
    kept = read_kept(file, lambda x: json.loads(x.read_text())) or {}
    if kept and kept.get('about') != about:
        left = [name for name in kept if name != 'about' and name not in measures]
        if left:  # hours of work, and perhaps only the time stamps of the images are others
            aside = file.with_name(f'{file.name}.{digest_file(file)[:8]}')
            file.replace(aside)
            print(
                f'{file}: {", ".join(left)} were measured of other weights, settings or images, '
                f'and are not measured now; they are in {aside.name}.'
            )
        kept = {}
    kept = kept or dict(about=about)
    for name, version in VERSIONS.items():
        if name in kept and kept[name].get('version', 1) != version:
            del kept[name]
            if name not in measures:
                print(f'{file}: {name} is measured otherwise now, and is left out until it is.')
    for name in measures:
        if name not in kept:
            start = time.monotonic()
            found = getattr(network, name)()
            seconds = time.monotonic() - start
            kept[name] = found | dict(seconds=seconds, version=VERSIONS.get(name, 1))
            write_text(file, json.dumps(kept, indent=1))
    if {'accuracy', 'corruptions'} <= set(kept):  # nothing is left that needs features
        shutil.rmtree(network.source.cache_dir, ignore_errors=True)
    return {
        key: value
        for name, figures in kept.items()
        if name != 'about'
        for key, value in figures.items()
        if key not in ('seconds', 'version')
    }


class _Network:
    """A frozen network, with a method for each of :data:`MEASURES`; see :func:`measure`."""

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        layer: int,
        images: int,
        num_workers: int,
        solver: str | None,
    ) -> None:
        self.cfg, self.checkpoint, self.layer = cfg, checkpoint, layer
        self.images, self.num_workers, self.solver = images, num_workers, solver
        set_random_seed(cfg.randomness.seed)  # of the untrained network
        own = deepcopy(cfg)
        own.evaluation.val_turned = turned(own.evaluation.val)
        cache = Path(f'{cfg.work_dir}.features')
        self.source = CachedFeatures(own, checkpoint, cache, num_workers=num_workers)

    @cached_property
    def weights(self) -> Any:
        """A running digest, of the backbone alone: the rest of a checkpoint may be left out."""
        digest = hashlib.sha256()
        for values in self.source.network.backbone.state_dict().values():
            digest.update(values.cpu().numpy().tobytes())
        return digest

    @cached_property
    def _probe(self) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
        return accuracies(self.source, self.solver)

    def accuracy(self) -> dict[str, Any]:
        return self._probe[0] | dict(rankme=rank_me(self.source.load('val')[0]))

    def corruptions(self) -> dict[str, Any]:
        _, classify = self._probe
        by_kind: dict[str, list[float]] = {}
        for key in _add_corruptions(self.source.cfg, self.images):
            features, labels = self.source.load(key)
            top1 = float((classify(features) == labels).double().mean())
            by_kind.setdefault(key.partition('/')[0], []).append(top1)
        mean = statistics.mean(x for some in by_kind.values() for x in some)
        return dict(corruptions_by_kind=by_kind, corruptions=mean)

    def equivariance(self) -> dict[str, Any]:
        with token_maps_of(self.source.network.backbone) as token_maps:
            batches = spaced_images(self.cfg, 'val', self.images, num_workers=self.num_workers)
            layers = equivariance_by_layer(token_maps, batches, TRANSFORMATIONS)
        found: dict[str, Any] = dict(layers=layers)
        for key in ('r2', 'retrieval'):
            found[key] = layers['mixture'][self.layer - 1][key]
            found[f'{key}_last'] = layers['mixture'][-1][key]
        return found

    def dense(self) -> dict[str, Any]:
        seed = self.cfg.randomness.seed
        options = dict(images=self.images, num_workers=self.num_workers, seed=seed)
        found = measure_dense(self.cfg, self.checkpoint, **options)
        own: dict[str, Any] = dict(
            correspondence=found['correspondence'],
            accuracy_by_angle=found['angle'],
            position=found['position'],
            angle=statistics.mean(x['probe'] for x in found['angle'].values()),
            position_last=found['position']['layers'][-1]['r2'],
        )
        groups = summarize_angles(found['correspondence'])
        for key, group in dict(matched=AFFINE, matched_turns='quarter turns').items():
            for end, at in {'': self.layer - 1, '_last': -1}.items():
                own[f'{key}{end}'] = statistics.mean(x[at]['matched'] for x in groups[group])
        return own

    def cost(self) -> dict[str, Any]:
        """What training took, and how its losses fell, from the log of the run."""
        records = read_scalars(self.cfg.work_dir)
        terms = sorted({key for record in records for key in record if 'loss' in key})
        step = count_step(self.cfg, self.cfg.train_dataloader.batch_size)
        return dict(
            losses=[{key: r[key] for key in ('step', *terms) if key in r} for r in records],
            gflops=step['flops'] / 1e9,
            step_seconds=statistics.median([r['time'] for r in records]) if records else None,
        )

    def boxes(self) -> dict[str, Any]:
        """The mAP of a detector, which is kept by the weights that it was trained on."""
        backbone = (self.cfg.model.get('algorithm') or self.cfg.model).backbone.to_dict()
        root = Path(self.cfg.evaluation.val.get('data_root', 'data/tiny-imagenet-200'))
        folder = f'{self.cfg.work_dir}.boxes-{self.weights.hexdigest()[:8]}'
        found = box_map(self.checkpoint, self.cfg.randomness.seed, folder, root, backbone)
        return {f'box_{name.removeprefix("bbox_").lower()}': x for name, x in found.items()}


def _add_corruptions(cfg: Config, images: int) -> list[str]:
    """Add the corrupted validation images, each made once for all runs, to ``evaluation``."""
    # At equal distances: many data sets are in the order of their classes.
    indices = spaced_indices(len(build_loader(cfg, 'val')[1].dataset), images)
    given = cfg.evaluation.val.get('indices')
    if isinstance(given, Sequence):
        indices = [given[i] for i in indices]
    names = corrupted_datasets(dict(cfg.evaluation.val, indices=indices), CORRUPTIONS)
    for name, dataset in names.items():
        *once, pack = dataset['pipeline']
        cfg.evaluation[name] = dict(
            type='CachedImages',
            dataset=dict(dataset, pipeline=once, serialize_data=False),
            pipeline=[pack],
            serialize_data=False,  # it collects garbage, 75 times for seconds
        )
    return list(names)


def check_boxes(cfg: Config) -> None:
    """Check that 'boxes' can be measured, before the backbones are trained.

    Args:
        cfg (Config): Config with SER.

    Raises:
        ImportError: If MMDetection cannot run.
        ValueError: If the data has no boxes, or the detector does not take the backbone.
    """
    val, backbone = dataset_of(cfg, 'val'), cfg.model.algorithm.backbone
    if val['type'] != 'TinyImageNet':
        raise ValueError(
            f"measures: 'boxes' is measured on the boxes of TinyImageNet, and evaluation.val is "
            f'{val["type"]}; leave it out.'
        )
    if not isinstance(backbone.get('arch'), dict) or backbone.get('patch_size') != 8:
        raise ValueError(
            "measures: 'boxes' needs a ViT of patches of 8 whose arch is a dict, and "
            f'model.algorithm.backbone is {backbone.to_dict()}; leave it out.'
        )
    require_operators("measures: 'boxes'")
