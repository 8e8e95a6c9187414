"""From a folder of images to a pretrained backbone: config, training, figures and pictures."""

import html
import json
import os
from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS, MODELS
from PIL import Image

from ser_mm.checkpoint import read_weights
from ser_mm.engine.configs import find_config, shipped_configs
from ser_mm.engine.images import use_images
from ser_mm.engine.logs import read_scalars
from ser_mm.engine.schedules import follow_max_epochs
from ser_mm.evaluation.backbone import token_maps_of
from ser_mm.evaluation.data import build_loader, spaced_images, spaced_indices
from ser_mm.evaluation.equivariance import equivariance_by_layer
from ser_mm.evaluation.export import export_backbone
from ser_mm.evaluation.features import Embedder
from ser_mm.evaluation.results import make_table
from ser_mm.experiments.demo import token_map, training_views
from ser_mm.experiments.figures import TRANSFORMATIONS, evaluate
from ser_mm.experiments.runs import check_settings, finished, train
from ser_mm.files import read_kept, write_text
from ser_mm.visualization import (
    draw_losses,
    draw_neighbours,
    draw_token_maps,
    draw_views,
    restore_images,
)

METHODS = ('mocov3', 'dino', 'barlowtwins', 'byol', 'simsiam')
"""Algorithms that SER is added to, see the shipped configs ``ser_*.py``."""

_WIDTHS = dict(tiny=192, small=384, base=768)
_PATCHES = 16, 8
_DEPTHS = {18: 512, 34: 512, 50: 2048, 101: 2048}
BACKBONES: dict[str, dict[str, Any]] = {
    f'vit_{size}_patch{patch}': dict(
        config='vits16', channels=width, stride=patch, arch=f'deit-{size}', patch_size=patch
    )
    for size, width in _WIDTHS.items()
    for patch in _PATCHES
} | {
    f'resnet{depth}': dict(config='r50', channels=width, stride=16, depth=depth)
    for depth, width in _DEPTHS.items()
}
"""What ``model`` names: the config to start from, the width of features, the pixels of a token and
arguments of the backbone."""

_TIMM = 'timm/'
RUN = 'run'
IMAGES = 450
"""Validation images of R2 and of the pictures, at most."""
_SIDE = 224
"""Pixels of a view in the configs that runs start from."""


def pretrain(
    data: str | Path,
    out: str | Path,
    model: str = 'vit_small_patch16',
    method: str = 'mocov3',
    weights: str | Path | None = None,
    image_size: int = _SIDE,
    batch_size: int | None = None,
    epochs: int = 100,
    devices: int | None = None,
    num_workers: int | None = None,
    val_data: str | Path | None = None,
    seed: int = 0,
) -> Path:
    """Pretrain a backbone with SER on a folder of images, and say what it learned.

    The same call resumes what was interrupted, and makes nothing twice.

    Args:
        data (str | Path): Folder or list of images, see :class:`~ser_mm.datasets.ImageSource`.
        out (str | Path): Folder of the results.
        model (str): Of :data:`BACKBONES`, or 'timm/NAME' for a ViT or ResNet of timm. Defaults to
            'vit_small_patch16'.
        method (str): Of :data:`METHODS`. Defaults to 'mocov3'.
        weights (str | Path, optional): Checkpoint that the backbone starts from, of any kind that
            :func:`~ser_mm.checkpoint.load_backbone` knows; [CLS] enters where it did in that.
            Defaults to None: random weights.
        image_size (int): Side of the views in pixels. Defaults to 224.
        batch_size (int, optional): Images per step of all devices together. Defaults to None: see
            :func:`choose_batch_size`.
        epochs (int): Defaults to 100.
        devices (int, optional): GPUs, or CPU processes where there is none. Defaults to None: all
            GPUs that there are, or one process.
        num_workers (int, optional): Processes that read images, for each device. Defaults to None:
            by the number of cores.
        val_data (str | Path, optional): Validation images. Defaults to None: the folder ``val`` in
            ``data``, or every fifth image of each class.
        seed (int): Defaults to 0.

    Returns:
        Path: ``out``: the config ``run.py``, to be edited and trained by ``ser-mm train`` too;
        ``run/``, with checkpoints and logs; ``report.html``, ``figures.json`` and pictures; and,
        where timm is installed, ``timm/``, see
        :func:`~ser_mm.evaluation.export.export_backbone`.

    Raises:
        BlockingIOError: If another process trains this run.
        FileNotFoundError: If images or weights are missing.
        RunError: If training fails.
        ValueError: If an argument does not do, or ``out`` holds another run.

    Example:
        >>> pretrain('my images', 'out', model='vit_tiny_patch16', image_size=64, epochs=20)
    """
    out = Path(out).expanduser()
    cfg = pretraining_config(
        data,
        out,
        model=model,
        method=method,
        weights=weights,
        image_size=image_size,
        batch_size=batch_size,
        epochs=epochs,
        devices=devices,
        num_workers=num_workers,
        val_data=val_data,
        seed=seed,
    )
    try:
        check_settings(cfg)
    except ValueError as error:
        raise ValueError(
            f'{out} holds a run with other settings, in {RUN}.py; choose another --out, repeat the '
            'command that it was started with, or remove the folder.'
        ) from error
    steps = _steps_per_epoch(cfg, devices) * epochs
    print(f'{method} with SER, {model}: {epochs} epochs, {steps} steps; logs are in {out}')
    train({method: cfg}, gpus=_processes(devices))
    checkpoint = finished(cfg)
    assert checkpoint is not None  # or train would have raised
    # What needs no images comes first: some may be unreadable.
    try:
        usage = export_backbone(cfg, checkpoint, out / 'timm')
        print(f'{out / "timm"} is for timm:\n\n{usage}')
    except ImportError as error:  # the run has all else
        print(error)
    report(cfg, checkpoint, out)
    return out


def pretraining_config(
    data: str | Path,
    out: str | Path,
    model: str,
    method: str,
    weights: str | Path | None = None,
    image_size: int = _SIDE,
    batch_size: int | None = None,
    epochs: int = 100,
    devices: int | None = None,
    num_workers: int | None = None,
    val_data: str | Path | None = None,
    seed: int = 0,
) -> Config:
    """The config of a run: a shipped one, fitted to images, backbone and machine.

    Views, optimizer, schedules and losses are those of the shipped config. The learning rate is in
    proportion to the batch; ``equi_ratio`` is the paper's 0.01, or what gives two images in b2.

    Args:
        data (str | Path): See :func:`pretrain`.
        out (str | Path): See :func:`pretrain`.
        model (str): See :func:`pretrain`.
        method (str): See :func:`pretrain`.
        weights (str | Path, optional): See :func:`pretrain`. Defaults to None.
        image_size (int): See :func:`pretrain`. Defaults to 224.
        batch_size (int, optional): See :func:`pretrain`. Defaults to None.
        epochs (int): See :func:`pretrain`. Defaults to 100.
        devices (int, optional): See :func:`pretrain`. Defaults to None.
        num_workers (int, optional): See :func:`pretrain`. Defaults to None.
        val_data (str | Path, optional): See :func:`pretrain`. Defaults to None.
        seed (int): See :func:`pretrain`. Defaults to 0.

    Returns:
        Config: With ``work_dir``.

    Raises:
        FileNotFoundError: See :func:`pretrain`.
        ValueError: See :func:`pretrain`.
    """
    if epochs < 1 or seed < 0:
        raise ValueError(
            f'--epochs {epochs}, --seed {seed}: epochs are 1 or more, seeds 0 or more.'
        )
    if method not in METHODS:
        raise ValueError(f'--method {method}: choose one of {", ".join(METHODS)}.')
    if model.startswith(_TIMM):
        kind = _of_timm(model, image_size)
    elif model in BACKBONES:
        kind = dict(BACKBONES[model])
    else:
        raise ValueError(f'--model {model}: choose {", ".join(BACKBONES)} or {_TIMM}NAME.')
    name = f'ser_{method}_{kind.pop("config")}'
    if name not in shipped_configs():
        raise ValueError(f'--method {method} has no recipe for --model {model}; choose a ViT.')
    cfg = Config.fromfile(find_config(name))
    init_default_scope(cfg.default_scope)
    cfg.work_dir = str(Path(out).absolute() / RUN)
    cfg.randomness = dict(seed=seed)

    place, out = Path(data).expanduser().resolve(), Path(out).expanduser()
    if place.is_dir() and out.resolve().is_relative_to(place):
        raise ValueError(
            f'--out {out} is in --data {data}, where its pictures would be images to train on; '
            'choose a folder elsewhere.'
        )
    kept = read_kept(out / f'{RUN}.py', Config.fromfile) or Config()
    algorithm = cfg.model.algorithm
    algorithm.neck.in_channels = kind.pop('channels')
    stride = kind.pop('stride')
    if 'type' in kind:
        recipe = algorithm.backbone
        if kind['type'] == 'SERTimmViT':
            kind['stop_grad_conv1'] = recipe.get('stop_grad_conv1', False)
            kind['model_args']['drop_path_rate'] = recipe.get('drop_path_rate', 0.0)
        algorithm.backbone = ConfigDict(kind, ser_layer=recipe.ser_layer)
    else:
        algorithm.backbone.update(kind)
    if 'patch_size' in kind:
        algorithm.backbone.img_size = image_size
    if weights is not None:
        file = Path(weights).expanduser().absolute()
        if not file.is_file():
            raise FileNotFoundError(f'--weights {weights} is not a file; name a checkpoint.')
        algorithm.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(file))
        if name.endswith('vits16'):  # [CLS] enters where it did, which weights of others do not say
            late = [int(v) for k, v in read_weights(str(file)).items() if k.endswith('cls_after')]
            algorithm.backbone.cls_layer = late[0] if late else 0
    if image_size % stride or image_size < 2 * stride:
        raise ValueError(
            f'--image-size {image_size}: a token of {model} covers {stride} pixels; choose a '
            f'multiple of {stride}, {2 * stride} or more.'
        )

    if weights is not None:
        try:
            MODELS.build(deepcopy(algorithm.backbone)).init_weights()  # refused before the run
        except ValueError as error:
            told = str(error).partition(' does not fit')[0]
            raise ValueError(
                f'--weights {weights} do not fit --model {model}: choose the model that they are of'
                f'{"" if told != str(error) else f" ({told})"}.'
            ) from error

    use_images(cfg, data, val_data)
    if cfg.evaluation.val.with_label and len(_build(cfg.evaluation.train).metainfo['classes']) < 2:
        for dataset in cfg.evaluation.values():
            dataset.with_label = False
    for dataset in (cfg.train_dataloader.dataset, *cfg.evaluation.values()):
        _resize(dataset.pipeline, image_size)
    loader = cfg.train_dataloader
    ranks = _processes(devices) or 1
    count = len(_build(loader.dataset))
    # What nobody asked for stays as it is in a run that goes on, with more images or cores too.
    before = kept.get('train_dataloader') or {}
    batch = batch_size or before.get('batch_size', 0) * ranks or choose_batch_size(count, ranks)
    if batch % ranks or batch < 4 * ranks:
        raise ValueError(
            f'--batch-size {batch}: each of {ranks} devices needs a whole number of images, four '
            f'or more; choose {max(4, batch // ranks) * ranks}.'
        )
    if batch > count:
        raise ValueError(
            f'{data} has {count} images to train on, fewer than a batch of {batch}; add images, or '
            f'lower --batch-size to {count // ranks * ranks} or less.'
            if count >= 4 * ranks
            else f'{data} has {count} images to train on; give {4 * ranks} or more.'
        )
    loader.batch_size = batch // ranks
    if num_workers is None:
        num_workers = before.get('num_workers', _choose_workers(ranks))
    loader.num_workers = num_workers
    loader.dataset.pipeline[1].equi_ratio = max(0.01, 2 / batch)
    cfg.optim_wrapper.optimizer.lr *= batch / cfg.auto_scale_lr.base_batch_size
    cfg.auto_scale_lr.base_batch_size = batch
    cfg.train_cfg.max_epochs = epochs
    if 'warmup_epochs' in algorithm.head:
        algorithm.head.warmup_epochs = min(algorithm.head.warmup_epochs, epochs // 10)
    follow_max_epochs(cfg)
    interval = max(1, min(50, count // batch // 2))
    if kept:
        interval = kept.default_hooks.logger.interval
    cfg.default_hooks.logger.interval = interval
    return cfg


def _of_timm(model: str, image_size: int) -> dict[str, Any]:
    """As an entry of :data:`BACKBONES`, for a network of timm."""
    name = model.removeprefix(_TIMM)
    config = dict(type='SERTimmViT', model=name, model_args=dict(img_size=image_size))
    try:
        built = MODELS.build(dict(config))
    except ValueError as error:
        if 'SERTimmStages' not in str(error):
            raise ValueError(f'--model {model}: {error}') from error
        config = dict(type='SERTimmStages', model=name)
        try:
            built = MODELS.build(dict(config, ser_layer=3))
        except ValueError as other:
            raise ValueError(f'--model {model}: {other}') from other
        if 'resnet' not in name:
            raise ValueError(
                f'--model {model} has no recipe; choose a ViT or a ResNet, or write a config with '
                "type='SERTimmStages'."
            ) from error
        channels = MODELS.build(dict(config)).feature_channels
        return dict(config, config='r50', channels=channels, stride=built.token_map_stride)
    width, stride = built.embed_dims, built.token_map_stride
    return dict(config, config='vits16', channels=width, stride=stride)


def choose_batch_size(count: int, ranks: int = 1) -> int:
    """Images per step, where nobody says: 256 a GPU or 64 a CPU process, an eighth of few images.

    Args:
        count (int): Images to train on.
        ranks (int): Devices. Defaults to 1.
    """
    most = 256 if torch.cuda.is_available() else 64
    return ranks * max(4, min(most, count // (8 * ranks)))


def _processes(devices: int | None) -> int | None:
    """Processes that a launcher is to start; None for one without launcher."""
    if devices is None:
        devices = torch.cuda.device_count()
    return devices if devices > 1 else None


def _choose_workers(ranks: int) -> int:
    cores = len(os.sched_getaffinity(0)) // ranks
    # Without a GPU the cores are needed to train.
    return min(8, cores) if torch.cuda.is_available() else cores // 4


def _resize(pipeline: list[ConfigDict], side: int) -> None:
    """Scale the sizes in transforms, in place, those within others included."""

    def visit(node: Any) -> None:
        if isinstance(node, MutableMapping):
            for key, value in node.items():
                if key in ('scale', 'crop_size') and isinstance(value, int):
                    node[key] = round(value * side / _SIDE)
                else:
                    visit(value)
        elif isinstance(node, (list, tuple)):
            for part in node:
                visit(part)

    visit(pipeline)


def _build(dataset: dict) -> Any:
    """A data set without its transforms."""
    return DATASETS.build({**dataset, 'pipeline': []})


def _steps_per_epoch(cfg: Config, devices: int | None) -> int:
    loader = cfg.train_dataloader
    return len(_build(loader.dataset)) // (loader.batch_size * (_processes(devices) or 1))


def report(cfg: Config, checkpoint: str, out: Path) -> Path:
    """Figures and pictures of a pretrained backbone, on one page.

    Args:
        cfg (Config): What :func:`pretraining_config` returned.
        checkpoint (str): The final checkpoint of the run.
        out (Path): Folder of ``report.html``, ``figures.json`` and the pictures.

    Returns:
        Path: The page.
    """
    print('figures and pictures', flush=True)
    pictures, layer = out / 'pictures', cfg.model.algorithm.backbone.ser_layer
    records = {name: read_scalars(cfg.work_dir) for name in ('pretraining',)}
    draw_losses(records, pictures / 'losses.png')
    views, preprocessor = training_views(cfg)
    draw_views(views, lambda x: restore_images(x, preprocessor), pictures / 'views.png')

    preprocessor, _ = build_loader(cfg, 'val')
    images = torch.cat(list(spaced_images(cfg, 'val', IMAGES)))
    draw_token_maps(
        {'pretrained': token_map(cfg, checkpoint, layer), 'untrained': token_map(cfg, None, layer)},
        images,
        lambda x: restore_images(x, preprocessor),
        pictures / 'token_maps.png',
    )
    val = _build(cfg.evaluation.val)
    files = [val.get_data_info(i)['img_path'] for i in spaced_indices(len(val), IMAGES)]
    embedder = Embedder(cfg, checkpoint)
    features = torch.nn.functional.normalize(embedder.embed(files), dim=1)
    nearest = (features @ features.T).topk(min(6, len(files)), dim=1).indices.tolist()
    chosen = spaced_indices(len(files), 6)
    draw_neighbours(
        [[_thumbnail(files[j]) for j in nearest[i]] for i in chosen], pictures / 'neighbours.png'
    )

    if cfg.evaluation.val.with_label:
        found = evaluate(cfg, checkpoint, IMAGES)
    else:
        with token_maps_of(embedder.backbone) as token_maps:
            found = dict(layers=equivariance_by_layer(token_maps, [images], TRANSFORMATIONS))
    write_text(out / 'figures.json', json.dumps(found, indent=1))
    page = out / 'report.html'
    write_text(page, _page(cfg, found, layer))
    print(f'{_summary(found, layer)}\n{page} shows it.', flush=True)
    return page


def _thumbnail(file: str) -> Image.Image:
    with Image.open(file) as image:
        image.draft('RGB', (256, 256))
        if image.mode[0] in 'IF':  # more than 8 bits, which would be cut off
            pixels = np.asarray(image, np.float64)
            low, high = pixels.min(), pixels.max()
            image = Image.fromarray(np.uint8(255 * (pixels - low) / ((high - low) or 1)))
        small = image.convert('RGB')
    small.thumbnail((128, 128))
    return small


def _summary(found: Mapping[str, Any], layer: int) -> str:
    """A table in Markdown of what was measured."""
    titles = dict(probe='linear probe', probe_turned='linear probe, turned images', knn='k-NN')
    rows = [[title, f'{found[key]:.3f}'] for key, title in titles.items() if key in found]
    mixture = found['layers']['mixture']
    rows += [
        [f'R2 after block {layer}', f'{mixture[layer - 1]["r2"]:.3f}'],
        ['R2 after the last block', f'{mixture[-1]["r2"]:.3f}'],
    ]
    return make_table(['on validation images', ''], rows)


def _page(cfg: Config, found: Mapping[str, Any], layer: int) -> str:
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
        f'<h1>{html.escape(about)}</h1><pre>{html.escape(_summary(found, layer))}</pre>{shown}'
    )
