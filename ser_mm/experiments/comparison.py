"""Arms of a comparison, seed by seed: trained, measured, and set against each other."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

from ser_mm.engine.cpu import type_name
from ser_mm.evaluation.data import build_loader, check_evaluation, spaced_indices
from ser_mm.experiments.differences import (
    draw_comparison,
    read_comparison,
    report_comparison,
)
from ser_mm.experiments.figures import stamp_data
from ser_mm.experiments.measures import MEASURES, VERSIONS, check_boxes, measure
from ser_mm.experiments.runs import (
    check_settings,
    final_checkpoint,
    finished,
    reserved,
    set_processes,
    train,
)
from ser_mm.experiments.sweeps import (
    CLS_LAYER,
    CONFIG,
    LOSS_WEIGHT,
    NAME,
    Point,
    load_base,
    run_config,
    ser_layer,
)
from ser_mm.files import digest_file, write_text

ARMS = dict(
    untrained='untrained',
    baseline='baseline',
    late_cls='late [CLS]',
    views_only='views only',
    ser='SER',
    ser_early_cls='SER, [CLS] first',
    supervised='supervised',
)
"""Arms, by the name that the command line takes, and what tables call them."""


def arm_config(
    cfg: Config, arm: str, seed: int, work_dir: Path, cfg_options: Mapping[str, Any]
) -> Config:
    """Config of a run of an arm.

    Args:
        cfg (Config): Config with SER, see :func:`~ser_mm.experiments.sweeps.load_base`.
        arm (str): Of :data:`ARMS`. 'supervised' is the config beside the baseline's with
            ``supervised_`` in place of the algorithm's name.
        seed (int): Seed of the run.
        work_dir (Path): Folder of all runs.
        cfg_options (Mapping[str, Any]): See :func:`~ser_mm.experiments.sweeps.run_config`.

    Raises:
        ValueError: If there is no config of the arm, or the network has no [CLS] to move.
    """
    config = Path(cfg.filename)
    supervised = f'supervised_{config.stem.removeprefix("ser_").partition("_")[2]}'
    if arm == 'supervised' and not config.with_name(f'{supervised}.py').is_file():
        raise ValueError(
            f'arms: {config} has no {supervised}.py beside it; leave supervised out, or write it.'
        )
    backbone = cfg.model.algorithm.backbone
    kind = MODELS.get(backbone.type)  # None if there is no such type, which is told later
    if (
        arm in ('late_cls', 'ser_early_cls')
        and kind
        and 'cls_layer' not in signature(kind).parameters
    ):
        raise ValueError(
            f'arms: {arm} is of a ViT, and model.algorithm.backbone is {kind.__name__}, which has '
            'no [CLS] to move; leave it out.'
        )
    points: dict[str, Point] = {
        'views_only': {LOSS_WEIGHT: 0.0},
        'ser': {},
        'ser_early_cls': {CLS_LAYER: 0},
        'supervised': {CONFIG: supervised, NAME: arm},
    }
    own = run_config(cfg, points.get(arm), seed, work_dir, cfg_options)
    if arm in ('untrained', 'late_cls'):
        own.work_dir = str(Path(own.work_dir).with_name(arm))
    if arm == 'late_cls':
        layer = backbone.get('cls_layer')
        own.model.backbone.cls_layer = backbone.ser_layer if layer is None else layer
    return own


def compare(
    config: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    work_dir: Path,
    out: Path,
    cfg_options: Mapping[str, Any],
    measures: Sequence[str] = MEASURES,
    jobs: int = 1,
    gpus: int | None = None,
    images: int = 1000,
    train_images: int | None = None,
    num_workers: int = 0,
    solver: str | None = None,
) -> Path:
    """Train the arms of a comparison from every seed, measure them, and report.

    Args:
        config (Path): Config with SER; the others are found from it.
        arms (Sequence[str]): Of :data:`ARMS`.
        seeds (Sequence[int]): Seeds of every arm.
        work_dir (Path): Folder of all runs.
        out (Path): Folder of the results, a JSON file with the name of the base algorithm's config
            and its tables in Markdown. The JSON is written after each run; runs of the same recipe
            and measures that it holds already stay, wherever they were trained.
        cfg_options (Mapping[str, Any]): Fields of the config of all runs to override.
        measures (Sequence[str]): Of :data:`MEASURES`. Defaults to all.
        jobs (int): Runs that train at the same time. Defaults to 1.
        gpus (int, optional): See :func:`~ser_mm.experiments.runs.training`. Defaults to None.
        images (int): See :func:`measure`. Defaults to 1000.
        train_images (int, optional): Training images, at equal distances, of the probes. Defaults
            to None: all.
        num_workers (int): See :func:`measure`. Defaults to 0.
        solver (str, optional): See :func:`measure`. Defaults to None.

    Returns:
        Path: The JSON file: ``about`` and ``runs``, a list with ``arm``, ``seed`` and the figures.

    Raises:
        BlockingIOError: If another process trains or measures one of the runs.
        FileNotFoundError: If data is missing.
        ImportError: If boxes are to be measured and MMDetection cannot run.
        RunError: If a run fails.
        ValueError: If the config or a run is refused, or if the JSON holds runs of other settings,
            or this arm and seed from another ``work_dir``.
    """
    cfg = load_base(config, cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    runs = {
        (arm, seed): arm_config(cfg, arm, seed, work_dir, cfg_options)
        for seed in seeds
        for arm in arms
    }
    if 'boxes' in measures:
        check_boxes(cfg)
    trained = {f'{arm} (seed {seed})': own for (arm, seed), own in runs.items()}
    trained = {name: own for name, own in trained.items() if not name.startswith('untrained')}
    check_evaluation(cfg)
    total = {split: len(build_loader(cfg, split)[1].dataset) for split in ('train', 'val')}
    some = None
    if train_images:
        some = spaced_indices(total['train'], train_images)
        given = cfg.evaluation.train.get('indices')
        some = [given[i] for i in some] if isinstance(given, Sequence) else some
    set_processes(trained.values(), gpus)
    for own in runs.values():
        check_settings(own)
    file = out / f'{config.stem.removeprefix("ser_")}.json'
    about = dict(
        config=config.stem,
        ser_layer=cfg.model.algorithm.backbone.ser_layer,
        cfg_options=dict(cfg_options),
        recipe=_recipe(cfg),
        versions=VERSIONS,
        data=total,
        epochs=cfg.train_cfg.max_epochs,
        batch_size=cfg.train_dataloader.batch_size,
        processes=gpus or 1,
        images=images,
        train_images=train_images,
        solver=solver,
    )
    held = {(run['arm'], run['seed']) for run in _kept_runs(file, about)}
    for (arm, seed), own in runs.items():
        if (ARMS[arm], seed) in held and not Path(f'{own.work_dir}.py').is_file():
            raise ValueError(
                f'--out: {file} holds {arm} (seed {seed}) already, from elsewhere than '
                f'{work_dir}; leave it out, or name another --out.'
            )
    order = list(ARMS.values())
    results: dict[str, Any] = dict(about=about)
    with reserved(runs.values()):
        todo = sum(not finished(own) for own in trained.values())
        print(f'{len(runs)} runs, {todo} to train; logs are in {work_dir}', flush=True)
        train(trained, jobs, gpus)
        data = stamp_data(_with_train_images(cfg, some))
        for (arm, seed), own in runs.items():
            print(f'measuring {arm} (seed {seed})', flush=True)
            Path(own.work_dir).mkdir(parents=True, exist_ok=True)
            # Of one that is not trained, too, as its weights do not tell all settings.
            write_text(f'{own.work_dir}.py', own.pretty_text)
            checkpoint = None if arm == 'untrained' else final_checkpoint(own)
            layer = ser_layer(cfg, own)
            own = _with_train_images(own, some)
            wanted = [x for x in measures if x != 'cost' or arm not in ('untrained', 'supervised')]
            found = measure(own, checkpoint, layer, wanted, data, images, num_workers, solver)
            # Read again: somebody may have added runs while these were trained.
            kept = _kept_runs(file, about)
            kept = [run for run in kept if (run['arm'], run['seed']) != (ARMS[arm], seed)]
            kept.append(dict(arm=ARMS[arm], seed=seed, precision=_precision(own), **found))
            results['runs'] = sorted(kept, key=lambda x: (order.index(x['arm']), x['seed']))
            write_text(file, json.dumps(results, indent=1) + '\n')
    text = report_comparison(results)
    write_text(file.with_suffix('.md'), f'{text}\n')
    draw_comparison(results, file.with_suffix(''))
    print(f'\n{text}\n\nResults are in {file} and .md.')
    return file


def _precision(cfg: Config) -> str | None:
    """In which a run was trained, which the machine may have decided; None for one that was not."""
    written = sorted(Path(cfg.work_dir).glob('*/vis_data/config.py'))
    if not written:
        return None
    wrapper = Config.fromfile(written[-1]).optim_wrapper
    kind = type_name(wrapper)
    if kind in ('AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        return wrapper.get('dtype') or ('bfloat16' if kind.startswith('CPU') else 'float16')
    return 'float32'


def _kept_runs(file: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs that results hold already, which others may have trained elsewhere."""
    if not file.is_file():
        return []
    found = read_comparison(file, '--out')
    given = found.get('about')
    given = given if isinstance(given, dict) else {}
    # What options change is in the recipe, without the places of files.
    others = [
        f'{key} {given.get(key)!r}, here {value!r}'
        for key, value in about.items()
        if given.get(key) != value and key != 'cfg_options'
    ]
    if others:
        raise ValueError(
            f'--out: {file} holds runs of other settings ({"; ".join(others)}); name another '
            'folder, or move that file away.'
        )
    unknown = {run['arm'] for run in found['runs']} - set(ARMS.values())
    if unknown:
        raise ValueError(
            f'--out: {file} has arms of another kind ({", ".join(sorted(map(str, unknown)))}); '
            'name another folder, or move that file away.'
        )
    return found['runs']


def _recipe(cfg: Config) -> str:
    """A digest of what runs and figures depend on, of the config with SER, but places of files."""
    keys = ('model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'evaluation')
    keys += ('custom_hooks', 'load_from', 'sync_bn', 'model_wrapper_cfg')
    reading = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')
    loader = cfg.train_dataloader.items()
    parts = {key: cfg.get(key) for key in keys}
    if cfg.get('load_from') and Path(cfg.load_from).is_file():
        parts['load_from'] = digest_file(cfg.load_from)
    parts['train_dataloader'] = {key: value for key, value in loader if key not in reading}
    text = json.dumps(_without_places(parts), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_places(value: Any) -> Any:
    places = ('data_root', 'data_prefix', 'ann_file', 'folder')
    if isinstance(value, Mapping):
        return {k: _without_places(x) for k, x in value.items() if k not in places}
    return [*map(_without_places, value)] if isinstance(value, list | tuple) else value


def _with_train_images(cfg: Config, indices: Sequence[int] | None) -> Config:
    """A config whose probes learn from some of the training images."""
    cfg = deepcopy(cfg)
    if indices is not None:
        cfg.evaluation.train['indices'] = indices
    return cfg
