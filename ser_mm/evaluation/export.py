"""A trained backbone as other libraries load it: timm, torchvision, plain MMPretrain, ONNX."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from ser_mm.datasets import LoadChannels
from ser_mm.datasets.transforms.load_channels import MEAN, STD
from ser_mm.evaluation.backbone import as_config, build_backbone
from ser_mm.evaluation.conversion import to_mmpretrain, to_onnx, to_timm, to_torchvision
from ser_mm.evaluation.data import build_preprocessor, evaluation_pipeline
from ser_mm.evaluation.features import Embedder
from ser_mm.files import replacing, replacing_folder

LIBRARIES = ('timm', 'mmpretrain', 'torchvision', 'onnx')
"""Libraries that a backbone can be exported to."""

_FILES = {'README.md', 'config.json', 'model.safetensors', 'ser_vit.py', '__pycache__'}
_MARK = 'exported_by'

_CLASSIFIERS = {'ResNet': 'fc', 'ConvNeXt': 'head.fc'}


def export_backbone(
    cfg: Config | str | Path, checkpoint: str, out: str | Path, to: str = 'timm'
) -> str:
    """Write the backbone of a run so that another library loads it without this package.

    What is written is compared with the backbone first, on random images, in float64, or float32
    for ONNX.

    Args:
        cfg (Config | str | Path): Config of a run, its path, or the name of a shipped one, see
            :func:`~ser_mm.evaluation.build_backbone`.
        checkpoint (str): Path or URL of its weights; it is read as data.
        out (str | Path): For timm a folder, with weights, mean, std and image size, a model card
            and, for a ViT with a late [CLS], the module ``ser_vit.py``; an earlier export is
            replaced. Otherwise a file that is not there yet.
        to (str): 'timm'; 'mmpretrain', for its own class, which needs no module of this package;
            'torchvision', for a ResNet; or 'onnx', for any backbone: a program that takes any
            number of images of one size, and has what timm calls the data config as JSON in its
            metadata. Defaults to 'timm'.

    Returns:
        str: Lines of Python that load it; an ONNX program is also run, on ``images``.

    Raises:
        FileExistsError: If ``out`` holds something else.
        ImportError: If the library is not installed.
        ValueError: If the library has no network like this, see
            :func:`~ser_mm.evaluation.conversion.to_timm`, ``to_torchvision``, ``to_mmpretrain`` and
            ``to_onnx``.

    Example:
        >>> export_backbone('ser_mocov3_vits16', 'epoch_100.pth', 'out/timm')
    """
    if to not in LIBRARIES:
        raise ValueError(f"to='{to}': choose one of {', '.join(LIBRARIES)}.")
    out = Path(out).expanduser()
    _check_place(out, to, checkpoint)
    cfg = as_config(cfg)
    if to == 'onnx':
        return _write_onnx(cfg, checkpoint, out)
    backbone = build_backbone(cfg, checkpoint).cpu()
    if to == 'mmpretrain':
        return _write_mmpretrain(cfg, backbone, out)
    if to == 'torchvision':
        network = to_torchvision(backbone)
        _take_rgb(network.conv1, cfg)
        _save(network.state_dict(), out)
        return (
            f'network = torchvision.models.resnet{backbone.depth}()\n'
            'network.fc = torch.nn.Identity()\n'
            f'network.load_state_dict({_loading(out)})\n'
            'network.eval()'
        )
    network, architecture, arguments = to_timm(backbone)
    data = data_config(cfg, backbone)
    _take_rgb(network.get_submodule(_first_conv(network)), cfg)
    config = dict(
        architecture=architecture,
        num_classes=0,
        num_features=network.num_features,
        global_pool=arguments.get('global_pool', 'avg'),
        model_args=arguments,
        pretrained_cfg=dict(
            **data,
            custom_load=False,
            fixed_input_size='img_size' in arguments,
            num_classes=0,
            pool_size=None,
            first_conv=_first_conv(network),
            classifier=_CLASSIFIERS.get(type(network).__name__, 'head'),
        ),
    )
    own = architecture.startswith('ser_')

    def usage(place: str) -> str:
        first = ['import sys', f'sys.path.insert(0, {place!r})', 'import ser_vit'] if own else []
        lines = [
            *first,
            'import timm',
            f"network = timm.create_model('local-dir:{place}', pretrained=True, num_classes=0)",
            'network.eval()',
            'data = timm.data.resolve_model_data_config(network)',
            _preparing(cfg),
        ]
        return '\n'.join(lines)

    card = _card(cfg, checkpoint, config, usage('FOLDER'))
    with replacing_folder(out) as folder:
        _save(network.state_dict(), folder / 'model.safetensors')
        text = json.dumps({**config, _MARK: 'ser_mm'}, indent=2)
        (folder / 'config.json').write_text(text + '\n')
        (folder / 'README.md').write_text(card)
        if own:
            source = Path(__file__).with_name('_ser_vit.py').read_text()
            (folder / 'ser_vit.py').write_text(source)
    return usage(str(out))


def data_config(cfg: Config, backbone: nn.Module) -> dict[str, Any]:
    """What timm calls the data config of a network, from the config of its run.

    Args:
        cfg (Config): Config of the run: ``data_preprocessor``, and the transforms of
            ``evaluation.val`` or else of ``test_dataloader``.
        backbone (nn.Module): A ViT, whose image size is that of its positions, or another network,
            whose image size is what the transforms crop, or 224.

    Returns:
        dict: ``input_size``, ``mean`` and ``std`` of RGB between 0 and 1, or, of what
        ``LoadChannels`` loads with other types than uint8, of values as they are in files;
        ``interpolation``, ``crop_pct`` and ``crop_mode``.

    Raises:
        ValueError: If the config says nothing of the normalization.
    """
    channels = next(p for p in backbone.parameters() if p.ndim == 4).shape[1]
    preprocessor = build_preprocessor(cfg)
    # Without a mean the network takes values from 0 to 255.
    mean, std = torch.zeros(channels), torch.ones(channels)
    if preprocessor._enable_normalize:
        mean, std = (
            x.cpu().flatten().expand(channels) for x in (preprocessor.mean, preprocessor.std)
        )
    mean, std = mean.double() / 255, std.double() / 255
    if _takes_bgr(cfg, channels):
        mean, std = mean.flip(0), std.flip(0)
    if load := _loads_channels(cfg):
        of_files = torch.tensor([load.mean, load.std], dtype=torch.float64)
        scale = 255 / STD * of_files[1]
        mean, std = of_files[0] + (mean - MEAN / 255) * scale, std * scale
    found = {
        str(x.get('type')).rpartition('.')[2].removeprefix('Fast'): x
        for x in evaluation_pipeline(cfg)
    }
    resize = found.get('ResizeEdge') or found.get('Resize') or {}
    edge, crop = resize.get('scale'), found.get('CenterCrop', {}).get('crop_size')
    of_sides = 'ResizeEdge' not in found and bool(edge)
    squashes = of_sides and not resize.get('keep_ratio')
    if squashes and not crop:
        crop = _pair(edge)[::-1]  # mmcv has the width first
    height, width = getattr(backbone, 'img_size', None) or _pair(crop or 224)
    share = 1.0
    if crop and edge and (squashes or (not of_sides and resize.get('edge', 'short') == 'short')):
        size, edge = min(_pair(crop)), min(_pair(edge))
        share = size / edge
        if math.floor(size / share) != edge:  # as timm gets the edge from it
            share = size / (edge + 0.5)
    # Without one MMPretrain's transforms are bilinear; where nothing is resized, timm may choose.
    mode = resize.get('interpolation', 'bilinear' if resize else 'bicubic')
    return dict(
        input_size=[channels, height, width],
        # As float32 knows them; a mean of values of 32 bits may be many deviations.
        mean=[float(f'{x:.{12 if load else 7}g}') for x in mean.tolist()],
        std=[float(f'{x:.7g}') for x in std.tolist()],
        interpolation=mode if mode in ('nearest', 'bilinear', 'bicubic', 'lanczos') else 'bicubic',
        crop_pct=share,
        crop_mode='squash' if squashes else 'center',
    )


def _loads_channels(cfg: Config) -> LoadChannels | None:
    first = next(iter(evaluation_pipeline(cfg)), {})
    if not str(first.get('type')).endswith('LoadChannels'):
        return None
    return LoadChannels(**{key: value for key, value in first.items() if key != 'type'})


def _preparing(cfg: Config) -> str:
    load = _loads_channels(cfg)
    if not load:
        return 'transform = timm.data.create_transform(**data)'
    values = 'values / 255' if load.dtype == 'uint8' else f'values of {load.dtype}'
    return f"# images: ({values} - data['mean']) / data['std'], by channel"


def _first_conv(network: nn.Module) -> str:
    return next(name for name, x in network.named_modules() if isinstance(x, nn.Conv2d))


def _takes_bgr(cfg: Config, channels: int) -> bool:
    """Whether the network takes the channels in the order of the files' readers, BGR.

    Data sets that hold pixels, as CIFAR, have them in RGB, and nothing turns them either.
    """
    if channels != 3 or build_preprocessor(cfg).to_rgb:
        return False
    places = [cfg.get(x) for x in ('train_dataloader', 'evaluation', 'test_dataloader')]
    return _loads_files(places) or not any(places)


def _loads_files(place: Any) -> bool:
    """Whether there is a transform that loads files, in a config or below."""
    if isinstance(place, Mapping):
        name = str(place.get('type')).rpartition('.')[2]
        return name.startswith('Load') or _loads_files(list(place.values()))
    return isinstance(place, list | tuple) and any(map(_loads_files, place))


def _take_rgb(conv: nn.Conv2d, cfg: Config) -> None:
    """Let a first layer take RGB, as other libraries give it."""
    if _takes_bgr(cfg, conv.in_channels):
        conv.weight.data = conv.weight.data.flip(1)


def _check_place(out: Path, to: str, checkpoint: str) -> None:
    """Refuse to write where something else is."""
    if to != 'timm':
        if out.is_dir():
            raise FileExistsError(f'{out} is a folder; name a file for an export to {to}.')
        if out.exists():  # a file of weights does not tell whose they are
            if os.path.exists(checkpoint) and os.path.samefile(out, checkpoint):
                raise FileExistsError(f'{out} is the checkpoint itself; name another file.')
            raise FileExistsError(f'{out} is there already; remove it, or name another file.')
        return
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file; name a folder for an export to timm.')
    held = {entry.name for entry in os.scandir(out)}
    other = sorted(held - _FILES) or sorted(held)
    if other and not (held <= _FILES and _is_export(out / 'config.json')):
        raise FileExistsError(
            f'{out} holds {other[0]}, which is no earlier export; name a new or an empty folder.'
        )


def _is_export(file: Path) -> bool:
    try:
        return _MARK in json.loads(file.read_text())
    except (OSError, ValueError):
        return False


def _write_mmpretrain(cfg: Config, backbone: nn.Module, out: Path) -> str:
    model = cfg.model.get('algorithm') or cfg.model
    network, config = to_mmpretrain(model.backbone, backbone)
    weights = {f'backbone.{name}': value for name, value in network.state_dict().items()}
    _save(weights, out, lambda x: dict(state_dict=x))
    config['init_cfg'] = dict(type='Pretrained', checkpoint=str(out), prefix='backbone.')
    return f'backbone = {pformat(config, sort_dicts=False, width=96)}'


def _write_onnx(cfg: Config, checkpoint: str, out: Path) -> str:
    network = Embedder(cfg, checkpoint).cpu()
    network.eval()
    data = data_config(cfg, network.backbone)
    _take_rgb(network.backbone.get_submodule(_first_conv(network.backbone)), cfg)
    program = to_onnx(network, data['input_size'])
    program.metadata_props.add(key='data', value=json.dumps(data))
    with replacing(out) as part:
        part.write_bytes(program.SerializeToString())
    channels, *size = data['input_size']
    return (
        'import json, onnxruntime\n'
        f'session = onnxruntime.InferenceSession({str(out)!r})\n'
        "data = json.loads(session.get_modelmeta().custom_metadata_map['data'])\n"
        f'# images: float32, (N, {channels}, {", ".join(map(str, size))}), as data says\n'
        '(features,) = session.run(None, dict(images=images))'
    )


def _save(weights: dict, file: Path, holder: Callable[[dict], Any] = lambda x: x) -> None:
    weights = {name: value.contiguous() for name, value in weights.items()}
    with replacing(file) as part:
        if file.suffix == '.safetensors':
            import safetensors.torch

            safetensors.torch.save_file(weights, part, metadata=dict(format='pt'))
        else:
            torch.save(holder(weights), part)


def _loading(file: Path) -> str:
    if file.suffix == '.safetensors':
        return f'safetensors.torch.load_file({str(file)!r})'
    return f'torch.load({str(file)!r})'


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _card(cfg: Config, checkpoint: str, config: dict, usage: str) -> str:
    """The model card: what it is, how it is loaded, what it takes."""
    data = config['pretrained_cfg']
    algorithm = (cfg.model.get('algorithm') or cfg.model).get('type')
    with_ser = ' with SER' if cfg.model.get('algorithm') else ''
    late = config['model_args'].get('cls_layer')
    size = ' x '.join(map(str, data['input_size'][1:]))
    load = _loads_channels(cfg)
    channels = data['input_size'][0]
    pixels = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
    values = 'between 0 and 1' if not load or load.dtype == 'uint8' else f'of {load.dtype}'
    lines = [
        '---',
        'library_name: timm',
        'tags: [timm, image-feature-extraction, ser_mm]',
        '---',
        '',
        f'# {config["architecture"]}',
        '',
        f'A backbone of {config["num_features"]} features, trained by {algorithm}{with_ser} and '
        f'exported by ser_mm from `{Path(checkpoint).name}` of '
        f'`{Path(cfg.filename or "a config").name}`.',
        '',
        '```python',
        usage,
        '```',
        '',
        f'- Images: {pixels}, {size}, mean {data["mean"]}, std {data["std"]} of values {values}.',
        *(
            [
                f'- [CLS] enters after block {late} of {config["model_args"]["depth"]}: '
                '`ser_vit.py` holds this network, and has to be imported before.'
            ]
            if late
            else []
        ),
        '- Other sizes: `dynamic_img_size=True`, or `img_size=...`; timm resamples the positions.'
        if 'img_size' in config['model_args']
        else '- Other sizes: any.',
        '',
    ]
    return '\n'.join(lines)
