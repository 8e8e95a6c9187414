"""Points of sweeps, the configs of their runs, and what is reported of them."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.models import BaseClassifier
from mmpretrain.registry import MODELS

from ser_mm.engine.schedules import follow_max_epochs
from ser_mm.evaluation.backbone import build_model
from ser_mm.evaluation.cost import TrainingStep, count_step, take_turns
from ser_mm.evaluation.data import check_evaluation
from ser_mm.evaluation.equivariance import TITLES
from ser_mm.evaluation.results import (
    describe_seeds,
    format_mean,
    make_table,
    mean_and_deviation,
    write_results,
)
from ser_mm.experiments.figures import TRANSFORMATIONS, at_layer, evaluate, stamp_data
from ser_mm.experiments.runs import (
    check_settings,
    final_checkpoint,
    finished,
    reserved,
    set_processes,
    train,
)
from ser_mm.visualization import draw_curves

SWEEPS = ('layer', 'cls', 'equi_ratio', 'temperature', 'loss_weight', 'gradient', 'addons')
ADDONS = dict(augself='AugSelf', equimod='EquiMod', stl='STL', essl='E-SSL')
"""Methods that SER was compared with, by the beginning of their configs' names."""
FACTORS = (1 / 4, 1 / 2, 1, 2, 4)
COLUMNS = {
    'probe': 'linear probe',
    'probe_turned': 'probe, turned images',
    'knn': 'k-NN',
    'r2': 'R2 at SER layer',
    'retrieval': 'retrieval at SER layer',
    'r2_last': 'R2 at last block',
    'retrieval_last': 'retrieval at last block',
}

SER_LAYER = 'model.algorithm.backbone.ser_layer'
CLS_LAYER = 'model.algorithm.backbone.cls_layer'
EQUI_RATIO = 'train_dataloader.dataset.pipeline.1.equi_ratio'
DEVICE_RATIO = 'model.data_preprocessor.equi_ratio'
"""The same where the views are made on the device."""
IN_CHANNELS = 'model.neck.in_channels'
STRIDE = 'model.data_preprocessor.patch_size'
TEMPERATURE = 'model.head.temperature'
LOSS_WEIGHT = 'model.loss_weight'
CONFIG, NAME = 'config', 'name'
"""Fields of a point that is another config than that of the sweeps, and what to call its runs."""
NAMED = (SER_LAYER, CLS_LAYER, EQUI_RATIO, DEVICE_RATIO, TEMPERATURE, LOSS_WEIGHT)

Point = dict[str, Any]
"""Fields of the config to set, by their place in it."""


def load_base(config: Path, cfg_options: Mapping[str, Any]) -> Config:
    """The config that the runs of sweeps differ from.

    Args:
        config (Path): Config with SER.
        cfg_options (Mapping[str, Any]): Fields to override, by their place in the config.

    Raises:
        ValueError: If it has no SER, or is not trained by epochs.
    """
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(cfg_options))
    if cfg.model.type != 'SERAlgorithm' or 'max_epochs' not in cfg.train_cfg:
        raise ValueError(
            f"{config}: model.type='{cfg.model.type}', or train_cfg has no max_epochs; choose a "
            "config with type='SERAlgorithm' that is trained by epochs."
        )
    return cfg


def points(
    cfg: Config, sweep: str, values: Sequence[float] | None = None, processes: int = 1
) -> dict[Any, Point | None]:
    """The settings of a sweep, those that differ from the config, by the value to show.

    Args:
        cfg (Config): What :func:`load_base` returned.
        sweep (str): Of :data:`SWEEPS`.
        values (Sequence[float], optional): Values of the setting. Defaults to None: those of the
            sweep; 'gradient' and 'addons' have no others.
        processes (int): That share a step; with fewer than two images in b2 none trains, and such
            ratios are no default. Defaults to 1.

    Returns:
        dict: Settings by value; None stands for the base algorithm without SER.

    Raises:
        ValueError: If the network has no such setting.
    """
    if sweep == 'gradient':
        return {'baseline': None, 'views only': {LOSS_WEIGHT: 0.0}, 'SER': {}}
    model = build_model(cfg)
    if sweep == 'addons':
        return _addons(Path(cfg.filename).stem.removeprefix('ser_'), model.backbone.ser_layer)
    depth = getattr(model.backbone, 'num_layers', None) or model.backbone.num_stages
    pipeline = cfg.train_dataloader.dataset.pipeline
    current = {
        SER_LAYER: model.backbone.ser_layer,
        CLS_LAYER: getattr(model.backbone, 'cls_layer', None),
        TEMPERATURE: model.ser_head.temperature,
        LOSS_WEIGHT: model.loss_weight,
        EQUI_RATIO: pipeline[1].get('equi_ratio') if len(pipeline) > 1 else None,
        DEVICE_RATIO: model.data_preprocessor.equi_ratio,
    }
    # Where the config says nothing of these, they follow the layer by themselves.
    given = {IN_CHANNELS: _field(cfg, IN_CHANNELS), STRIDE: _field(cfg, STRIDE)}
    current |= {place: value for place, value in given.items() if value is not None}
    found: dict[Any, Point] = {}
    if sweep in ('layer', 'cls') and any(x != int(x) for x in values or ()):
        raise ValueError(
            f'{sweep}: the values {list(values or ())} are numbers of blocks; give whole ones.'
        )
    if sweep == 'layer':
        for layer in map(int, values or range(1, depth + 1)):
            found[layer] = {SER_LAYER: layer}
            options = dict(ser_layer=layer)
            if current[CLS_LAYER] is not None:
                options['cls_layer'] = found[layer][CLS_LAYER] = min(layer, depth - 1)
            # The maps of a ResNet's stages differ in channels and stride.
            part = MODELS.build({**deepcopy(cfg.model.algorithm.backbone), **options})
            fitting = {IN_CHANNELS: part.token_map_channels, STRIDE: part.token_map_stride}
            found[layer] |= {place: x for place, x in fitting.items() if place in current}
    else:
        place = dict(
            cls=CLS_LAYER,
            equi_ratio=DEVICE_RATIO if model.data_preprocessor.views else EQUI_RATIO,
            temperature=TEMPERATURE,
            loss_weight=LOSS_WEIGHT,
        )[sweep]
        if current[place] is None:
            raise ValueError(f'{sweep}: {place} is not in {cfg.filename}; leave this sweep out.')
        if sweep == 'cls':
            values = list(map(int, values or range(depth)))
        elif not values:
            values = [current[place] * factor for factor in FACTORS]
            if sweep == 'equi_ratio':
                batch = cfg.train_dataloader.batch_size * processes
                fit = [x for x in values if x <= 1 and round(x * batch) >= 2]
                values = fit if current[place] in fit else values  # which are refused when trained
        found = {value: {place: value} for value in values}
    return {
        value: {place: x for place, x in settings.items() if x != current[place]}
        for value, settings in found.items()
    }


def _addons(base: str, layer: int) -> dict[str, Point | None]:
    """SER, the methods that it was compared with, in both forms, and their controls."""
    inside = {
        'model.algorithm.backbone.ser_layer': layer,
        'model.algorithm.backbone.cls_layer': 0,
    }
    found: dict[str, Point | None] = {
        'baseline': None,
        'SER, weight 0': {LOSS_WEIGHT: 0.0},
        'SER': {},
    }
    for key, title in ADDONS.items():
        own = {CONFIG: f'{key}_{base}', NAME: key}
        if key == 'stl':  # the others' controls are the baseline, bit by bit
            found[f'{title}, weight 0'] = {**own, NAME: f'{key},loss_weight=0', LOSS_WEIGHT: 0.0}
        found[title] = own
        found[f'{title} after block {layer}'] = {
            **own,
            NAME: f'{key},ser_layer={layer}',
            **inside,
        }
    for title, name in {
        'baseline, E-SSL crops as views': f'{base}_turned_crops',
        'baseline, 2 + 4 views': f'{base}_multicrop',
        'SER, 2 + 4 views': f'ser_{base}_multicrop',
    }.items():
        found[title] = {CONFIG: name, NAME: name}
    return found


def _field(cfg: Config, place: str) -> Any:
    """What a config says at a place, None if it says nothing."""
    found: Any = cfg
    for key in place.split('.'):
        found = (found or {}).get(key)
    return found


def run_config(
    cfg: Config, point: Point | None, seed: int, work_dir: Path, cfg_options: Mapping[str, Any]
) -> Config:
    """Config of one run; its folder has the name of what differs from the config of the sweeps.

    Args:
        cfg (Config): What :func:`load_base` returned.
        point (Point, optional): What differs. None for the base algorithm, the config beside it
            without ``ser_`` in its name.
        seed (int): Seed of the run.
        work_dir (Path): Folder of all sweeps.
        cfg_options (Mapping[str, Any]): What :func:`load_base` was given. The base algorithm and
            other methods take over what is not of SER, so neither its layer nor the place of [CLS].

    Raises:
        ValueError: If there is no config of the base algorithm, or of another method.
    """
    config = Path(cfg.filename)
    if point is not None and CONFIG in point:
        file = config.with_name(f'{point[CONFIG]}.py')
        if not file.is_file():
            raise ValueError(f'addons: {config} has no {file.name} beside it.')
        name, own = point[NAME], Config.fromfile(file)
        _take_options(own, cfg_options)
        own.merge_from_dict({k: v for k, v in point.items() if k not in (CONFIG, NAME)})
    elif point is None:
        file = config.with_name(config.name.removeprefix('ser_'))
        if file == config or not file.is_file():
            raise ValueError(f'{config} has no baseline {file.name} beside it, to compare with.')
        name, own = 'baseline', Config.fromfile(file)
        _take_options(own, cfg_options)
    else:
        own = deepcopy(cfg)
        own.merge_from_dict(point)
        settings = {place.rpartition('.')[2]: x for place, x in point.items() if place in NAMED}
        name = ','.join(f'{key}={x:g}' for key, x in settings.items()) or 'SER'
        name = 'views_only' if settings == dict(loss_weight=0.0) else name
    follow_max_epochs(own)
    own.randomness = dict(own.get('randomness') or {}, seed=seed)
    own.work_dir = str(work_dir / config.stem.removeprefix('ser_') / f'seed{seed}' / name)
    return own


def _take_options(own: Config, cfg_options: Mapping[str, Any]) -> None:
    """Set fields of another config than that of the sweeps, those that are not of SER alone."""
    if own.model.type == 'SERAlgorithm':
        own.merge_from_dict(dict(cfg_options))
        return
    kind = MODELS.get(own.model.type)
    classifies = isinstance(kind, type) and issubclass(kind, BaseClassifier)
    pixels = ('mean', 'std', 'to_rgb')
    inside = ('backbone.', *(f'data_preprocessor.{x}' for x in pixels)) if classifies else ('',)
    for place, value in cfg_options.items():
        if place in (SER_LAYER, CLS_LAYER, EQUI_RATIO):
            continue  # [CLS] would follow SER's layer, and b2 is SER's
        if place.startswith(tuple(f'model.algorithm.{part}' for part in inside)):
            there = place if 'algorithm' in own.model else place.replace('.algorithm', '', 1)
            own.merge_from_dict({there: value})
        elif not place.startswith('model.'):
            own.merge_from_dict({place: value})
    # The preprocessor of SER's model tells how all see the images.
    for place, value in cfg_options.items():
        owner, _, name = place.rpartition('.')
        if owner == 'model.data_preprocessor' and name in pixels:
            for other in (owner, 'data_preprocessor', 'model.algorithm.data_preprocessor'):
                if _field(own, other):
                    own.merge_from_dict({f'{other}.{name}': value})


def ser_layer(cfg: Config, run: Config) -> int:
    """Block at which SER is in a run, or would be in that of the base algorithm.

    Args:
        cfg (Config): What :func:`load_base` returned.
        run (Config): What :func:`run_config` returned.
    """
    backbone = (run.model.get('algorithm') or run.model).backbone
    return backbone.get('ser_layer') or cfg.model.algorithm.backbone.ser_layer


def costs(runs: Mapping[Any, Config]) -> dict[Any, dict[str, Any]]:
    """What the points of a sweep cost, whatever they learn.

    Args:
        runs (Mapping[Any, Config]): A run of each, by value.

    Returns:
        dict[Any, dict[str, Any]]: By value, ``views``, their sizes in pixels, ``gflops`` of a step,
        its ``seconds``, and ``time``, their ratio to those of the first point. Steps are timed in
        turn, without reading images.
    """
    sizes = {value: run.train_dataloader.batch_size for value, run in runs.items()}
    counted = {value: count_step(run, sizes[value]) for value, run in runs.items()}
    steps = {value: TrainingStep(run, sizes[value]) for value, run in runs.items()}
    timed = take_turns(steps, rounds=7)
    return {
        value: dict(
            views=counted[value]['views'],
            gflops=counted[value]['flops'] / 1e9,
            seconds=timed[value]['seconds'],
            time=timed[value]['time_ratio'],
        )
        for value in runs
    }


def report_sweep(out: Path, sweep: str, results: dict[Any, list[dict]], seeds: list[int]) -> str:
    """Draw a sweep, and make its table: mean and standard deviation over seeds.

    Args:
        out (Path): Folder of the figures, ``SWEEP.png`` and ``SWEEP_blocks.png``.
        sweep (str): Its name.
        results (dict): By value, what :func:`~ser_mm.experiments.figures.at_layer` returned for
            each seed.
        seeds (list[int]): The seeds.

    Returns:
        str: Markdown.
    """
    # Sweeps of before have no figures of turned images.
    columns = {
        key: title
        for key, title in COLUMNS.items()
        if all(key in run for runs in results.values() for run in runs)
    }
    rows, panels = [], {title: {sweep: []} for title in columns.values()}
    priced = sweep == 'addons'
    for value, runs in results.items():
        shown = f'{value:g}' if isinstance(value, float) else value
        rows.append([shown])
        for key, title in columns.items():
            values = [run[key] for run in runs]
            rows[-1].append(format_mean(values))
            panels[title][sweep].append((shown, *mean_and_deviation(values)))  # evenly spaced
        if priced:
            first, cost = next(iter(results.values()))[0]['cost'], runs[0]['cost']
            views = Counter(max(view) for view in cost['views'])
            rows[-1] += [
                ' + '.join(f'{count} x {side}' for side, count in views.items()),
                f'{cost["gflops"] / first["gflops"]:.3f}',
                f'{cost["time"]:.2f}',
            ]
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(panels, out / f'{sweep}.png', sweep)
    curves = {
        f'{title}, {moves}': {
            f'{value:g}' if isinstance(value, float) else str(value): [
                (i + 1, *mean_and_deviation([run['layers'][moves][i][key] for run in runs]))
                for i in range(len(runs[0]['layers'][moves]))
            ]
            for value, runs in results.items()
        }
        for key, title in TITLES.items()
        for moves in TRANSFORMATIONS
    }
    draw_curves(curves, out / f'{sweep}_blocks.png', 'block', len(TRANSFORMATIONS))
    titles = [sweep, *columns.values(), *(('views', 'FLOPs', 'time') if priced else ())]
    return f'{make_table(titles, rows)}\n\n{describe_seeds(seeds).capitalize()}'


def run_sweeps(
    config: Path,
    sweeps: Sequence[str],
    seeds: Sequence[int],
    work_dir: Path,
    cfg_options: Mapping[str, Any],
    values: Sequence[float] | None = None,
    jobs: int = 1,
    gpus: int | None = None,
    images: int = 450,
    num_workers: int = 0,
    solver: str | None = None,
) -> Path:
    """Train all points of sweeps, evaluate, print tables, and draw.

    Args:
        config (Path): Config with SER.
        sweeps (Sequence[str]): Of :data:`SWEEPS`.
        seeds (Sequence[int]): Seeds of every point.
        work_dir (Path): Folder of all sweeps, where each config has its own.
        cfg_options (Mapping[str, Any]): Fields of the config to override.
        values (Sequence[float], optional): See :func:`points`. Defaults to None.
        jobs (int): Runs at the same time. Defaults to 1.
        gpus (int, optional): See :func:`~ser_mm.experiments.runs.training`. Defaults to None.
        images (int): See :func:`~ser_mm.experiments.figures.evaluate`. Defaults to 450.
        num_workers (int): See :func:`~ser_mm.experiments.figures.evaluate`. Defaults to 0.
        solver (str, optional): See :func:`~ser_mm.experiments.figures.evaluate`. Defaults to None.

    Returns:
        Path: Folder of the results, ``SWEEP.json``, ``.md``, ``.png`` and ``SWEEP_blocks.png``.

    Raises:
        BlockingIOError: If another process trains or evaluates one of the runs.
        FileNotFoundError: If data to evaluate on is missing.
        RunError: If a run fails.
        ValueError: If the config or a run is refused.
    """
    start = time.monotonic()
    cfg = load_base(config, cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    plan = {
        sweep: {
            value: {seed: run_config(cfg, point, seed, work_dir, cfg_options) for seed in seeds}
            for value, point in points(cfg, sweep, values, gpus or 1).items()
        }
        for sweep in sweeps
    }
    # By seed, so that what is ready first is a whole sweep of one seed.
    runs = {
        f'{Path(own.work_dir).name} (seed {seed})': own
        for seed in seeds
        for settings in plan.values()
        for own in (by_seed[seed] for by_seed in settings.values())
    }
    for own in {str(own.get('evaluation')): own for own in runs.values()}.values():
        check_evaluation(own)  # before days of training
    out = work_dir / config.stem.removeprefix('ser_')
    set_processes(runs.values(), gpus)
    for own in runs.values():
        check_settings(own)
    with reserved(runs.values()):
        todo = sum(not finished(own) for own in runs.values())
        print(f'{len(runs)} runs, {todo} to train; logs are in {out}', flush=True)
        train(runs, jobs, gpus)
        # Once for all runs: a data set may have a million files.
        different = {str(own.evaluation): own for own in runs.values()}
        data = {key: stamp_data(own) for key, own in different.items()}

        def measure(own: Config) -> dict[str, Any]:
            known = data[str(own.evaluation)]
            found = evaluate(own, final_checkpoint(own), images, num_workers, solver, known)
            return at_layer(found, ser_layer(cfg, own))

        for sweep, settings in plan.items():
            results = {}
            for value, by_seed in settings.items():
                print(f'evaluating {sweep} {value}', flush=True)
                results[value] = [measure(own) for own in by_seed.values()]
            if sweep == 'addons':
                first = {value: next(iter(by_seed.values())) for value, by_seed in settings.items()}
                for value, cost in costs(first).items():
                    for found in results[value]:
                        found['cost'] = cost
            text = report_sweep(out, sweep, results, list(seeds))
            write_results(out, sweep, dict(seeds=list(seeds), results=results), text)
    print(f'Figures are beside them ({time.monotonic() - start:.0f} s).')
    return out
