"""Arms of a comparison, seed by seed: trained, measured, and set against each other."""

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmpretrain.registry import MODELS

from ser_mm.engine.logs import read_scalars
from ser_mm.engine.operators import require_operators
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.cost import count_step
from ser_mm.evaluation.data import (
    build_loader,
    check_evaluation,
    dataset_of,
    spaced_images,
    spaced_indices,
)
from ser_mm.evaluation.dense import AFFINE, measure_dense, summarize_angles
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.features import CachedFeatures
from ser_mm.evaluation.metrics import paired_difference, rank_me
from ser_mm.evaluation.results import (
    describe_seeds,
    format_mean,
    make_table,
    mean_and_deviation,
)
from ser_mm.evaluation.robustness import CORRUPTIONS, corrupted_datasets
from ser_mm.experiments.boxes import box_map
from ser_mm.experiments.figures import (
    TRANSFORMATIONS,
    accuracies,
    stamp_data,
    turned,
)
from ser_mm.experiments.runs import check_settings, finished, reserved, train
from ser_mm.experiments.sweeps import (
    CLS_LAYER,
    CONFIG,
    LOSS_WEIGHT,
    NAME,
    SER_LAYER,
    Point,
    load_base,
    run_config,
    ser_layer,
)
from ser_mm.files import read_kept, write_text
from ser_mm.visualization import draw_curves

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
MEASURES = ('accuracy', 'corruptions', 'equivariance', 'dense', 'cost', 'boxes')

COLUMNS = dict(
    probe='linear probe',
    knn='k-NN',
    probe_turned='probe, turned images',
    corruptions='probe, corruptions',
    angle='probe, mean of angles',
    r2='R2 at SER layer',
    retrieval='retrieval at SER layer',
    r2_last='R2 at last block',
    matched='correspondence, affine, at SER layer',
    matched_last='correspondence, affine, last block',
    matched_turns_last='correspondence, quarter turns, last block',
    position_last='position R2, last block',
    rankme='RankMe',
    box_map='box mAP, frozen',
)
"""Figures of a run, one number each, and their titles."""
PAIRS = (
    ('SER', 'baseline'),
    ('SER', 'views only'),
    ('SER', 'late [CLS]'),
    ('late [CLS]', 'baseline'),
    ('views only', 'late [CLS]'),
)
"""Differences that are reported. The last two are parts of the first."""


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
    if arm == 'supervised':  # the same network
        own.merge_from_dict(
            {
                place.replace('.algorithm', '', 1): value
                for place, value in cfg_options.items()
                if place.startswith('model.algorithm.backbone.')
                and place not in (SER_LAYER, CLS_LAYER)
            }
        )
    return own


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

    A measure is taken again where the checkpoint, the settings or the images are others.

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
    file = Path(f'{cfg.work_dir}.measures.json')
    cache = Path(f'{cfg.work_dir}.features')
    set_random_seed(cfg.randomness.seed)  # of the untrained network
    own = deepcopy(cfg)
    own.evaluation.val_turned = turned(own.evaluation.val)
    corrupted = _add_corruptions(own, images) if 'corruptions' in measures else []
    source = CachedFeatures(own, checkpoint, cache, num_workers=num_workers)
    # Of the backbone alone, so that a checkpoint is the same when the rest was left out.
    digest = hashlib.sha256()
    for values in source.network.backbone.state_dict().values():
        digest.update(values.cpu().numpy().tobytes())
    # A detector is kept by the weights that it was trained on.
    detector = Path(f'{cfg.work_dir}.boxes-{digest.hexdigest()[:8]}')
    digest.update(repr((cfg.evaluation, layer)).encode())
    about = dict(digest=digest.hexdigest(), data=data, images=images, solver=solver)
    kept = read_kept(file, lambda x: json.loads(x.read_text())) or {}
    kept = kept if kept.get('about') == about else dict(about=about)
    missing = [name for name in measures if name not in kept]
    for name in missing:
        start = time.monotonic()
        if name == 'accuracy':
            found, _ = accuracies(source, solver)
            found['rankme'] = rank_me(source.load('val')[0])
        elif name == 'corruptions':
            _, classify = accuracies(source, solver)
            found = dict(corruptions_by_kind={})
            for key in corrupted:
                features, labels = source.load(key)
                top1 = float((classify(features) == labels).double().mean())
                found['corruptions_by_kind'].setdefault(key.partition('/')[0], []).append(top1)
            found['corruptions'] = statistics.mean(
                x for some in found['corruptions_by_kind'].values() for x in some
            )
        elif name == 'equivariance':
            with token_maps_of(source.network.backbone) as token_maps:
                batches = spaced_images(own, 'val', images, num_workers=num_workers)
                layers = equivariance_by_layer(token_maps, batches, TRANSFORMATIONS)
            found = dict(layers=layers)
            for key in ('r2', 'retrieval'):
                found[key] = layers['mixture'][layer - 1][key]
                found[f'{key}_last'] = layers['mixture'][-1][key]
        elif name == 'dense':
            found = _dense(
                measure_dense(
                    own,
                    checkpoint,
                    images=images,
                    num_workers=num_workers,
                    seed=own.randomness.seed,
                ),
                layer,
            )
        elif name == 'boxes':
            found = _boxes(cfg, checkpoint, detector)
        else:
            found = _cost(cfg)
        kept[name] = found | dict(seconds=time.monotonic() - start)
        write_text(file, json.dumps(kept, indent=1))
    if {'accuracy', 'corruptions'} <= set(kept):  # nothing is left that needs them
        shutil.rmtree(cache, ignore_errors=True)
    return {
        key: value
        for name, figures in kept.items()
        if name != 'about'
        for key, value in figures.items()
        if key != 'seconds'
    }


def _add_corruptions(cfg: Config, images: int) -> list[str]:
    """Add the corrupted validation images, each made once for all runs, to ``evaluation``."""
    given = cfg.evaluation.val.get('indices')
    if isinstance(given, Sequence):
        indices = list(given[:images])
    else:
        indices = images if given is None else min(given, images)
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


def _dense(found: dict[str, Any], layer: int) -> dict[str, Any]:
    """The figures of :func:`~ser_mm.evaluation.dense.measure_dense` by name."""
    own: dict[str, Any] = {
        'correspondence': found['correspondence'],
        'accuracy_by_angle': found['angle'],
        'position': found['position'],
        'angle': statistics.mean(x['probe'] for x in found['angle'].values()),
        'position_last': found['position']['layers'][-1]['r2'],
    }
    groups = summarize_angles(found['correspondence'])
    for key, group in dict(matched=AFFINE, matched_turns='quarter turns').items():
        for end, at in {'': layer - 1, '_last': -1}.items():
            own[f'{key}{end}'] = statistics.mean(x[at]['matched'] for x in groups[group])
    return own


def _boxes(cfg: Config, checkpoint: str | None, work_dir: Path) -> dict[str, Any]:
    """The mAP of a detector on the frozen backbone, which is kept in a folder."""
    backbone = (cfg.model.get('algorithm') or cfg.model).backbone
    root = Path(cfg.evaluation.val.get('data_root', 'data/tiny-imagenet-200'))
    found = box_map(checkpoint, cfg.randomness.seed, work_dir, root, backbone.to_dict())
    return {f'box_{name.removeprefix("bbox_").lower()}': value for name, value in found.items()}


def _cost(cfg: Config) -> dict[str, Any]:
    """What training took, and how its losses fell, from the log of the run."""
    records = read_scalars(cfg.work_dir)
    terms = sorted({key for record in records for key in record if 'loss' in key})
    step = count_step(cfg, cfg.train_dataloader.batch_size)
    return dict(
        losses=[{key: r[key] for key in ('step', *terms) if key in r} for r in records],
        gflops=step['flops'] / 1e9,
        step_seconds=statistics.median([r['time'] for r in records]) if records else None,
    )


def _check_boxes(cfg: Config) -> None:
    """Check that a detector can be trained on the backbone, before those are trained."""
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
            and its tables in Markdown. The JSON is written after each run.
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
        ValueError: If the config or a run is refused.
    """
    cfg = load_base(config, cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpretrain')
    runs = {
        (arm, seed): arm_config(cfg, arm, seed, work_dir, cfg_options)
        for seed in seeds
        for arm in arms
    }
    if 'boxes' in measures:
        _check_boxes(cfg)
    trained = {f'{arm} (seed {seed})': own for (arm, seed), own in runs.items()}
    trained = {name: own for name, own in trained.items() if not name.startswith('untrained')}
    check_evaluation(cfg)
    some = None
    if train_images:
        some = spaced_indices(len(build_loader(cfg, 'train')[1].dataset), train_images)
        given = cfg.evaluation.train.get('indices')
        some = [given[i] for i in some] if isinstance(given, Sequence) else some
    for own in runs.values():
        check_settings(own)
    file = out / f'{config.stem.removeprefix("ser_")}.json'
    results: dict[str, Any] = dict(
        about=dict(
            config=config.stem,
            ser_layer=cfg.model.algorithm.backbone.ser_layer,
            cfg_options=dict(cfg_options),
            epochs=cfg.train_cfg.max_epochs,
            batch_size=cfg.train_dataloader.batch_size,
            images=images,
            train_images=train_images,
            solver=solver,
        ),
        runs=[],
    )
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
            checkpoint = None if arm == 'untrained' else finished(own)
            layer = ser_layer(cfg, own)
            own = _with_train_images(own, some)
            wanted = [x for x in measures if x != 'cost' or arm not in ('untrained', 'supervised')]
            found = measure(own, checkpoint, layer, wanted, data, images, num_workers, solver)
            results['runs'].append(dict(arm=ARMS[arm], seed=seed, **found))
            write_text(file, json.dumps(results, indent=1) + '\n')
    text = report_comparison(results)
    write_text(file.with_suffix('.md'), f'{text}\n')
    draw_comparison(results, file.with_suffix(''))
    print(f'\n{text}\n\nResults are in {file} and .md.')
    return file


def _with_train_images(cfg: Config, indices: Sequence[int] | None) -> Config:
    """A config whose probes learn from some of the training images."""
    cfg = deepcopy(cfg)
    if indices is not None:
        cfg.evaluation.train['indices'] = indices
    return cfg


def report_comparison(results: dict[str, Any]) -> str:
    """Tables in Markdown: means and deviations by arm, and paired differences.

    Args:
        results (dict): What :func:`compare` wrote.
    """
    by_arm: dict[str, dict[int, dict]] = {}
    for run in results['runs']:
        by_arm.setdefault(run['arm'], {})[run['seed']] = run
    columns = {k: t for k, t in COLUMNS.items() if any(k in run for run in results['runs'])}
    rows = [
        [
            title,
            *(
                format_mean(values) if (values := _values(runs, key)) else '-'
                for runs in by_arm.values()
            ),
        ]
        for key, title in columns.items()
    ]
    counts = ['runs', *(len(runs) for runs in by_arm.values())]
    tables = [make_table(['figure', *by_arm], [*rows, counts])]
    for one, other in PAIRS:
        seeds = sorted(by_arm.get(one, {}).keys() & by_arm.get(other, {}).keys())
        if len(seeds) < 2:
            continue
        rows = []
        for key, title in columns.items():
            pairs = [(by_arm[one][s].get(key), by_arm[other][s].get(key)) for s in seeds]
            if any(x is None or y is None for x, y in pairs):
                continue
            found = paired_difference(*zip(*pairs, strict=True))
            low, high = found['interval']
            rows.append(
                [
                    title,
                    f'{found["mean"]:+.4f}',
                    f'{low:+.4f} to {high:+.4f}',
                    f'{found["p"]:.3f}',
                    f'{found["positive"]} of {len(seeds)}',
                ]
            )
        header = [f'{one} - {other}', 'mean', '95 % interval', 'p', 'positive']
        tables.append(make_table(header, rows))
    seeds = sorted({run['seed'] for run in results['runs']})
    tables.append(
        f'{describe_seeds(seeds).capitalize()} Differences are paired by seed; intervals and p '
        "are of Student's t, uncorrected for the number of comparisons."
    )
    return '\n\n'.join(tables)


def draw_comparison(results: dict[str, Any], stem: Path) -> list[Path]:
    """Draw what depends on the angle and on the block, with standard deviations over seeds.

    Args:
        results (dict): What :func:`compare` wrote.
        stem (Path): Place and beginning of the names of the figures.

    Returns:
        list[Path]: The figures, ``..._angles.png`` and ``..._blocks.png``; none where nothing of
        them was measured.
    """
    layer = results['about']['ser_layer']
    figures: dict[str, dict[str, Callable[[dict], Mapping[Any, float]]]] = dict(
        angles={
            'linear probe': lambda run: {
                x: entry['probe'] for x, entry in run['accuracy_by_angle'].items()
            },
            f'tokens matched, block {layer}': lambda run: _matched(run, layer - 1),
            'tokens matched, last block': lambda run: _matched(run, -1),
        },
        blocks={
            'R2, quarter turn': lambda run: _by_block(run['layers']['rot90'], 'r2'),
            'R2, mixture': lambda run: _by_block(run['layers']['mixture'], 'r2'),
            'tokens matched, affine': lambda run: _by_block(
                run['correspondence'][AFFINE], 'matched'
            ),
            'position R2': lambda run: _by_block(run['position']['layers'], 'r2'),
        },
    )
    drawn = []
    for name, curves in figures.items():
        panels: dict[str, dict[str, Any]] = {}
        for title, curve in curves.items():
            by_arm: dict[str, list[Mapping[Any, float]]] = {}
            for run in results['runs']:
                with suppress(KeyError):  # not measured
                    by_arm.setdefault(run['arm'], []).append(curve(run))
            panels[title] = {
                arm: [
                    (float(x), *mean_and_deviation([found[x] for found in some])) for x in some[0]
                ]
                for arm, some in by_arm.items()
                if some
            }
        panels = {title: arms for title, arms in panels.items() if arms}
        if panels:
            drawn.append(stem.with_name(f'{stem.name}_{name}.png'))
            draw_curves(panels, drawn[-1], dict(angles='degrees', blocks='block')[name], 2)
    return drawn


def _matched(run: dict, at: int) -> dict[str, float]:
    """The share of tokens that are matched after a block, by angle."""
    found = run['correspondence'].items()
    return {angle: layers[at]['matched'] for angle, layers in found if angle != AFFINE}


def _by_block(entries: Sequence[Mapping[str, float]], key: str) -> dict[int, float]:
    return {i: entry[key] for i, entry in enumerate(entries, 1)}


def _values(runs: Mapping[int, dict], key: str) -> list[float]:
    return [run[key] for run in runs.values() if isinstance(run.get(key), float | int)]
