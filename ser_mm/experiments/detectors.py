"""Training runs of detectors on pretrained backbones, and their scores."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

from ser_mm.experiments.runs import final_checkpoint, reserved, train
from ser_mm.files import read_kept, replacing, write_text


def frozen_backbone(backbone: Mapping[str, Any]) -> dict:
    """Config of a pretrained backbone, frozen, as one of MMDetection's.

    Args:
        backbone (Mapping[str, Any]): Config of a ViT whose ``arch`` is a dict.
    """
    return dict(
        backbone,
        type=f'mmpretrain.{backbone["type"]}',
        out_type='featmap',
        frozen_stages=backbone['arch']['num_layers'],
    )


def write_random(backbone: Mapping[str, Any], seed: int, file: Path) -> None:
    """Keep random weights, so that loading them leaves the generators as loading others does.

    What a run draws for its seed then does not depend on whether its backbone is pretrained.

    Args:
        backbone (Mapping[str, Any]): Config of the backbone.
        seed (int): That gives the weights.
        file (Path): To write, if it is not there; their names start with 'backbone.'.
    """
    if file.is_file():
        return
    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.manual_seed(seed)
        network = MODELS.build(dict(backbone, init_cfg=None))
        network.init_weights()
    with replacing(file) as part:
        torch.save({f'backbone.{key}': value for key, value in network.state_dict().items()}, part)


def without_validation(cfg: Config) -> Config:
    """A config whose run is not evaluated while it trains, as :func:`train_and_score` does that.

    An interruption between the last checkpoint and its validation would leave a run without a
    score.

    Args:
        cfg (Config): Changed in place, and returned.
    """
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


def train_and_score(
    runs: Mapping[str, Config],
    metrics: Sequence[str],
    jobs: int | None = None,
    gpus: int | None = None,
) -> dict[str, dict[str, float]]:
    """Train detectors, and score what they find in their test data, each once.

    A score is kept beside the folder of its run, with the suffix ``.json``. Trained detectors are
    not trained again, interrupted runs go on.

    Args:
        runs (Mapping[str, Config]): Configs of MMDetection, see
            :func:`~ser_mm.experiments.runs.training`, which
            :func:`~ser_mm.experiments.runs.check_settings` has let pass.
        metrics (Sequence[str]): Names of MMDetection's metrics, without 'coco/'.
        jobs (int, optional): See :func:`~ser_mm.experiments.runs.training`. Defaults to None.
        gpus (int, optional): See :func:`~ser_mm.experiments.runs.training`. Defaults to None.

    Returns:
        dict[str, dict[str, float]]: By the name of the run, a value from 0 to 1 for each of the
        metrics.

    Raises:
        BlockingIOError: If another process trains one of them.
        RunError: If a run fails, or leaves no checkpoint of its last epoch.
    """
    with reserved(runs.values()), DefaultScope.overwrite_default_scope('mmdet'):
        kept = {name: _read_score(cfg, metrics) for name, cfg in runs.items()}
        missing = {name: cfg for name, cfg in runs.items() if kept[name] is None}
        for cfg in missing.values():  # one that is left of other settings, which were removed
            Path(f'{cfg.work_dir}.json').unlink(missing_ok=True)
        train(missing, jobs, gpus)
        scores: dict[str, dict[str, float]] = {}
        for name, cfg in runs.items():
            found = kept[name]
            if found is None:
                found = _score(cfg, metrics)
                write_text(f'{cfg.work_dir}.json', json.dumps(found))
            scores[name] = found
    return scores


def _read_score(cfg: Config, metrics: Sequence[str]) -> dict[str, float] | None:
    """The score that is kept of a run; None if there is none."""
    if not Path(f'{cfg.work_dir}.py').is_file():  # the settings that it was scored with
        return None
    return read_kept(
        f'{cfg.work_dir}.json',
        lambda file: {name: float(json.loads(file.read_text())[name]) for name in metrics},
    )


def _score(cfg: Config, metrics: Sequence[str]) -> dict[str, float]:
    """The metrics of the last checkpoint of a run."""
    from mmdet.apis import init_detector  # slow to import

    detector = init_detector(deepcopy(cfg), final_checkpoint(cfg), device=get_device())
    reading = deepcopy(cfg.test_dataloader)
    if not reading.get('num_workers'):
        reading.persistent_workers = False  # as ser-mm test: torch refuses it
    loader = Runner.build_dataloader(reading)
    evaluator = Evaluator(deepcopy(cfg.test_evaluator))
    evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in loader:
            evaluator.process(detector.test_step(batch), batch)
    found = evaluator.evaluate(len(loader.dataset))
    # MMDetection reports no metric when a detector finds nothing.
    return {name: float(found.get(f'coco/{name}', 0.0)) for name in metrics}
