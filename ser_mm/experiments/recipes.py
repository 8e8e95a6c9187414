"""The config of a pretraining: a shipped one, fitted to images, a backbone and a machine."""

import hashlib
import os
from collections.abc import MutableMapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS, MODELS

from ser_mm.datasets.tar_shards import file_of
from ser_mm.engine.checkpointing import written_checkpoints
from ser_mm.engine.configs import find_config, shipped_configs
from ser_mm.engine.cpu import count_cores
from ser_mm.engine.images import use_images
from ser_mm.engine.options import read_fields
from ser_mm.engine.pretrained import start_from
from ser_mm.engine.schedules import follow_max_epochs
from ser_mm.evaluation.data import spaced_indices
from ser_mm.experiments.channels import MEASURED, load_channels, measure_channels
from ser_mm.files import read_kept
from ser_mm.models.backbones.ser_timm_vit import create_timm

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

_TIMM, _LOCAL = 'timm/', 'local-dir:'
RUN = 'run'
"""Name of the folder of a run, and of its config beside it."""
_SIDE = 224
"""Pixels of a view in the configs that runs start from."""


def pretraining_config(
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
    channels: int | None = None,
) -> Config:
    """The config of a run: a shipped one, fitted to images, backbone and machine.

    Views, optimizer, schedules and losses are those of the shipped config. The learning rate is in
    proportion to the batch; ``equi_ratio`` is the paper's 0.01, or what gives two images in b2.
    Where ``out`` holds a run, what nobody asked for stays as it is there; that the images have
    changed meanwhile is told.

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
        channels (int, optional): Of images. Defaults to None: three for grey and colours, or as
            many as images have. Images of other numbers, or of more than 8 bits, are loaded by
            :class:`~ser_mm.datasets.LoadChannels`, mean and std measured on them.

    Returns:
        Config: With ``work_dir``.

    Raises:
        FileNotFoundError: If images or weights are missing.
        ValueError: If an argument does not do.
    """
    if epochs < 1 or seed < 0:
        raise ValueError(
            f'--epochs {epochs}, --seed {seed}: epochs are 1 or more, seeds 0 or more.'
        )
    place, out = Path(data).expanduser().resolve(), Path(out).expanduser().absolute()
    if place.is_dir() and out.resolve().is_relative_to(place):
        raise ValueError(
            f'--out {out} is in --data {data}, where its pictures would be images to train on; '
            'choose a folder elsewhere.'
        )
    cfg = _start(model, method, image_size)
    cfg.work_dir = str(out / RUN)
    cfg.randomness = dict(seed=seed)
    use_images(cfg, data, val_data)
    kept = read_kept(Path(f'{cfg.work_dir}.py'), Config.fromfile) or Config()
    before = kept.get('train_dataloader') or {}
    train = list_images(cfg.train_dataloader.dataset)
    load = before['dataset'].pipeline[0] if before else None
    if load is None or channels not in (None, load.get('channels')):
        looked = spaced_indices(len(train), MEASURED)
        load = measure_channels([train.get_data_info(i)['img_path'] for i in looked], channels)
    if load and load['type'] != 'LoadChannels':
        load = None
    if load:
        load_channels(cfg, load)
    if weights is not None:
        _start_from(weights, cfg.model.algorithm.backbone, model)
        if model.startswith(_TIMM) and not load:
            for place in (cfg, cfg.model.algorithm):
                place.data_preprocessor.update(_pixels_of_timm(cfg))
    evaluation = cfg.evaluation
    if evaluation.val.with_label and not _tells_classes_apart(evaluation):
        for dataset in evaluation.values():
            dataset.with_label = False
    for dataset in (cfg.train_dataloader.dataset, *evaluation.values()):
        _resize(dataset.pipeline, image_size)

    now = dict(count=len(train), digest=_digest(train, list_images(evaluation.val)))
    then = kept.get('images') if kept and written_checkpoints(cfg) else now
    if then:  # earlier versions did not write it
        cfg.images = then
        if then['digest'] != now['digest']:
            places = f'{data} or {val_data}' if val_data else data
            print(
                f'{places} has other images than when the run in {out} began ({then["count"]} to '
                f'train on then, {now["count"]} now); that run is not begun anew. Choose another '
                '--out for one of these images.'
            )
    ranks = processes(devices) or 1
    count = len(train)
    batch = batch_size or before.get('batch_size', 0) * ranks or choose_batch_size(count, ranks)
    _check_batch(batch, count, ranks, data)
    if num_workers is None:
        num_workers = before.get('num_workers', _choose_workers(ranks))
    cfg.train_dataloader.update(batch_size=batch // ranks, num_workers=num_workers)
    cfg.train_dataloader.dataset.pipeline[1].equi_ratio = max(0.01, 2 / batch)
    cfg.optim_wrapper.optimizer.lr *= batch / cfg.auto_scale_lr.base_batch_size
    cfg.auto_scale_lr.base_batch_size = batch
    cfg.train_cfg.max_epochs = epochs
    head = cfg.model.algorithm.head
    if 'warmup_epochs' in head:
        head.warmup_epochs = min(head.warmup_epochs, epochs // 10)
    follow_max_epochs(cfg)
    interval = max(1, min(50, count // batch // 2))
    if kept:
        interval = kept.default_hooks.logger.interval
    cfg.default_hooks.logger.interval = interval
    # The file that is written has no variables, whose copies a user might leave as they are.
    for name in cfg.keys() - read_fields(cfg) - {'custom_imports', 'images'}:
        cfg.pop(name)
    return cfg


def _tells_classes_apart(evaluation: ConfigDict) -> bool:
    """Whether sub-folders are classes, the same of images to train on and to validate."""
    try:
        val = list_images(evaluation.val).metainfo['classes']
    except ValueError:
        list_images({**evaluation.val, 'with_label': False})  # if it is not that each holds one
        return False
    train = list_images(evaluation.train).metainfo['classes']
    if train[: len(val)] != val:  # or else their numbers are the same
        odd = sorted(set(train) ^ set(val))
        print(
            f'Sub-folders of the images to train on and to validate differ ({odd[0]} and '
            f'{len(odd) - 1} more are in one only), so they are taken for no classes: there will '
            'be no accuracies.'
        )
        return False
    return len(train) > 1


def _digest(*datasets: Any) -> str:
    """Of the paths of all images, and the sizes of some."""
    digest = hashlib.sha256()
    for images in datasets:
        files = [images.get_data_info(i)['img_path'] for i in range(len(images))]
        digest.update('\0'.join(files).encode(errors='surrogateescape'))
        for i in spaced_indices(len(files), MEASURED):
            with suppress(OSError):  # in a remote store
                # Not when it was changed, which a copy may be without.
                digest.update(f' {os.stat(file_of(files[i])).st_size}'.encode())
    return digest.hexdigest()


def _start(model: str, method: str, image_size: int) -> Config:
    """The shipped config of a method, with a backbone."""
    if method not in METHODS:
        raise ValueError(f'--method {method}: choose one of {", ".join(METHODS)}.')
    if model.startswith(_TIMM):
        kind = _of_timm(model, image_size)
    elif model in BACKBONES:
        kind = dict(BACKBONES[model])
    else:
        raise ValueError(f'--model {model}: choose {", ".join(BACKBONES)} or {_TIMM}NAME.')
    name, stride, channels = (kind.pop(key) for key in ('config', 'stride', 'channels'))
    name = f'ser_{method}_{name}'
    if name not in shipped_configs():
        raise ValueError(f'--method {method} has no recipe for --model {model}; choose a ViT.')
    if image_size % stride or image_size < 2 * stride:
        raise ValueError(
            f'--image-size {image_size}: a token of {model} covers {stride} pixels; choose a '
            f'multiple of {stride}, {2 * stride} or more.'
        )
    cfg = Config.fromfile(find_config(name))
    init_default_scope(cfg.default_scope)
    algorithm = cfg.model.algorithm
    algorithm.neck.in_channels = channels
    recipe = algorithm.backbone
    if kind.get('type') == 'SERTimmViT':
        kind['stop_grad_conv1'] = recipe.get('stop_grad_conv1', False)
        kind['model_args']['drop_path_rate'] = recipe.get('drop_path_rate', 0.0)
    if 'type' in kind:
        algorithm.backbone = ConfigDict(kind, ser_layer=recipe.ser_layer)
    else:
        recipe.update(kind, **(dict(img_size=image_size) if 'patch_size' in kind else {}))
    return cfg


def _start_from(weights: str | Path, backbone: ConfigDict, model: str) -> None:
    """Let a backbone start from a checkpoint that fits it."""
    file = Path(weights).expanduser().absolute()
    if not file.is_file():
        raise FileNotFoundError(f'--weights {weights} is not a file; name a checkpoint.')
    start_from(backbone, file)
    try:
        MODELS.build(deepcopy(backbone)).init_weights()  # refused before the run
    except ValueError as error:
        told = str(error).partition(' does not fit')[0]
        channels = backbone.get('in_channels') or (backbone.get('model_args') or {}).get('in_chans')
        others = (
            f', or leave them out, if they are of other images than of {channels} channels'
            if channels not in (None, 3)
            else ''
        )
        raise ValueError(
            f'--weights {weights} do not fit --model {model}: choose the model that they are of'
            f'{others}{"" if told != str(error) else f" ({told})"}.'
        ) from error


def _check_batch(batch: int, count: int, ranks: int, data: str | Path) -> None:
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


def _of_timm(model: str, image_size: int) -> dict[str, Any]:
    """As an entry of :data:`BACKBONES`, for a network of timm."""
    name = model.removeprefix(_TIMM)
    if name.startswith(_LOCAL):
        name = f'{_LOCAL}{Path(name.removeprefix(_LOCAL)).expanduser().absolute()}'
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
    if built.num_layers < 4:
        raise ValueError(
            f'--model {model} has {built.num_layers} blocks, and SER is on the third; choose a '
            'network of four or more.'
        )
    width, stride = built.embed_dims, built.token_map_stride
    return dict(config, config='vits16', channels=width, stride=stride)


def _pixels_of_timm(cfg: Config) -> dict[str, list[float]]:
    """Mean and std that the weights of a network of timm were trained with."""
    from timm.data import resolve_model_data_config

    network = create_timm('--model', cfg.model.algorithm.backbone.model, None)
    data = resolve_model_data_config(network)
    return {key: [round(255 * x, 3) for x in data[key]] for key in ('mean', 'std')}


def choose_batch_size(count: int, ranks: int = 1) -> int:
    """Images per step, where nobody says: 256 a GPU or 64 a CPU process, an eighth of few images.

    Args:
        count (int): Images to train on.
        ranks (int): Devices. Defaults to 1.
    """
    most = 256 if torch.cuda.is_available() else 64
    return ranks * max(4, min(most, count // (8 * ranks)))


def processes(devices: int | None) -> int | None:
    """Processes that a launcher is to start.

    Args:
        devices (int, optional): GPUs, or CPU processes where there is none. None: all GPUs.

    Returns:
        int | None: None for one process without launcher.
    """
    if devices is None:
        devices = torch.cuda.device_count()
    return devices if devices > 1 else None


def _choose_workers(ranks: int) -> int:
    cores = count_cores() // ranks
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


def list_images(dataset: dict) -> Any:
    """Build a data set without its transforms.

    Args:
        dataset (dict): Config of it.
    """
    return DATASETS.build({**dataset, 'pipeline': []})
