"""A trained backbone as other libraries load it: timm, torchvision, plain MMPretrain."""

import json
import math
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
import torchvision
from mmengine.config import Config
from mmpretrain.models.backbones import ResNet, VisionTransformer
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ser_mm.checkpoint import to_timm_name
from ser_mm.evaluation.backbone import as_config, build_backbone
from ser_mm.evaluation.data import build_preprocessor
from ser_mm.files import replacing, replacing_folder
from ser_mm.models import SERTimmStages, SERTimmViT

LIBRARIES = ('timm', 'mmpretrain', 'torchvision')
"""Libraries that a backbone can be exported to."""

_FILES = {'README.md', 'config.json', 'model.safetensors', 'ser_vit.py', '__pycache__'}
_MARK = 'exported_by'

# What a config of ours says beside that of the class of MMPretrain which it builds on.
_OURS = {
    'SERVisionTransformer': (
        VisionTransformer,
        ('cls_layer', 'linear_init', 'pos_resize', 'ser_layer', 'stop_grad_conv1', 'with_cp'),
    ),
    'SERResNet': (ResNet, ('ser_layer',)),
}
# The ResNet of timm and torchvision, by MMPretrain's names.
_PLAIN_RESNET = dict(
    style='pytorch',
    avg_down=False,
    base_channels=64,
    deep_stem=False,
    dilations=(1, 1, 1, 1),
    num_stages=4,
    stem_channels=64,
    strides=(1, 2, 2, 2),
)
_CLASSIFIERS = {'ResNet': 'fc', 'ConvNeXt': 'head.fc'}
_VIT_SIZES = {192: 'tiny', 384: 'small', 768: 'base', 1024: 'large'}


def export_backbone(
    cfg: Config | str | Path, checkpoint: str, out: str | Path, to: str = 'timm'
) -> str:
    """Write the backbone of a run so that another library loads it without this package.

    What is written is compared with the backbone first, on a random image, in float64.

    Args:
        cfg (Config | str | Path): Config of a run, its path, or the name of a shipped one, see
            :func:`~ser_mm.evaluation.build_backbone`.
        checkpoint (str): Path or URL of its weights; it is read as data.
        out (str | Path): For timm a folder, with weights, mean, std and image size, a model card
            and, for a ViT with a late [CLS], the module ``ser_vit.py``. Otherwise a file. An
            earlier export is replaced.
        to (str): 'timm'; 'mmpretrain', for its own class, which needs no module of this package;
            or 'torchvision', for a ResNet. Defaults to 'timm'.

    Returns:
        str: Lines of Python that load it.

    Raises:
        FileExistsError: If ``out`` holds something else.
        ImportError: If the library is not installed.
        ValueError: If the library has no network like this, see :func:`to_timm`,
            :func:`to_torchvision` and :func:`to_mmpretrain`.

    Example:
        >>> export_backbone('ser_mocov3_vits16', 'epoch_100.pth', 'out/timm')
    """
    if to not in LIBRARIES:
        raise ValueError(f"to='{to}': choose one of {', '.join(LIBRARIES)}.")
    out = Path(out).expanduser()
    _check_place(out, to, checkpoint)
    cfg = as_config(cfg)
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
    lines = ['import sys', f'sys.path.insert(0, {str(out)!r})', 'import ser_vit'] if own else []
    usage = '\n'.join(
        [
            *lines,
            'import timm',
            f"network = timm.create_model('local-dir:{out}', pretrained=True, num_classes=0)",
            'network.eval()',
            'data = timm.data.resolve_model_data_config(network)',
            'transform = timm.data.create_transform(**data)',
        ]
    )
    card = _card(cfg, checkpoint, config, usage.replace(str(out), 'FOLDER'))
    with replacing_folder(out) as folder:
        _save(network.state_dict(), folder / 'model.safetensors')
        text = json.dumps({**config, _MARK: 'ser_mm'}, indent=2)
        (folder / 'config.json').write_text(text + '\n')
        (folder / 'README.md').write_text(card)
        if own:
            source = Path(__file__).with_name('_ser_vit.py').read_text()
            (folder / 'ser_vit.py').write_text(source)
    return usage


def to_timm(backbone: nn.Module) -> tuple[nn.Module, str, dict[str, Any]]:
    """The network of timm with the weights of a backbone, which gives the same features.

    Args:
        backbone (nn.Module): A ViT or a ResNet of MMPretrain or of this package, or one of timm in
            ``SERTimmViT`` or ``SERTimmStages``.

    Returns:
        tuple: The network, in eval mode, without a classifier; its name in timm; and the
        arguments, which JSON can hold, that ``timm.create_model`` builds it with.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If timm has no network like it; the sentence names what it lacks.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            'An export to timm needs timm, which is not installed: run `pip install '
            "'ser_mm[timm]'`."
        ) from error
    weights = backbone.state_dict()
    if isinstance(backbone, SERTimmViT | SERTimmStages):
        name, arguments = _timm_itself(backbone)
    elif isinstance(backbone, VisionTransformer):
        name, arguments = _timm_vit(backbone)
        weights = {to_timm_name(key): value for key, value in weights.items()}
    else:
        _check_resnet(backbone, 'timm')
        name, arguments = f'resnet{backbone.depth}', dict(in_chans=backbone.conv1.in_channels)
    if name.startswith('ser_'):
        import ser_mm.evaluation._ser_vit  # noqa: F401  registers the name
    # A configuration, as timm warns of a name that it has none for.
    network = timm.create_model(name, pretrained_cfg=dict(num_classes=0), **arguments)
    return _filled(network, weights, backbone, 'timm'), name, arguments


def to_torchvision(backbone: nn.Module) -> nn.Module:
    """The ResNet of torchvision with the weights of a backbone, and no classifier.

    Args:
        backbone (nn.Module): A ResNet of MMPretrain or of this package.

    Returns:
        nn.Module: In eval mode; its ``fc`` is the identity.

    Raises:
        ValueError: If it is another network; the sentence names what differs.
    """
    _check_resnet(backbone, 'torchvision')
    network = torchvision.models.get_model(f'resnet{backbone.depth}')
    network.fc = nn.Identity()
    if backbone.conv1.in_channels != network.conv1.in_channels:
        raise _refusal(backbone, 'torchvision', f'in_channels={backbone.conv1.in_channels}')
    return _filled(network, backbone.state_dict(), backbone, 'torchvision')


def to_mmpretrain(config: dict, backbone: nn.Module) -> tuple[nn.Module, dict]:
    """MMPretrain's own network with the weights of one of ours.

    Args:
        config (dict): That the backbone was built from.
        backbone (nn.Module): The backbone.

    Returns:
        tuple: The network, in eval mode, and its config.

    Raises:
        ValueError: If MMPretrain has no network like it: [CLS] enters late.
    """
    if getattr(backbone, 'cls_layer', 0) and not isinstance(backbone, SERTimmViT):
        raise _refusal(
            backbone,
            'mmpretrain',
            f'cls_layer={backbone.cls_layer}, a late [CLS]',
            'keep SERVisionTransformer, which loads the checkpoint as it is, or export to timm',
        )
    if isinstance(backbone, SERTimmViT | SERTimmStages):
        raise _refusal(backbone, 'mmpretrain', f"model='{backbone.model}'", 'export it to timm')
    kind, ours = _OURS.get(type(backbone).__name__, (type(backbone), ()))
    plain = {k: v for k, v in dict(config).items() if k not in ('init_cfg', *ours)}
    plain['type'] = kind.__name__
    network = MODELS.build(deepcopy(plain))
    return _filled(network, backbone.state_dict(), backbone, 'mmpretrain'), plain


def data_config(cfg: Config, backbone: nn.Module) -> dict[str, Any]:
    """What timm calls the data config of a network, from the config of its run.

    Args:
        cfg (Config): Config of the run: ``data_preprocessor``, and the transforms of
            ``evaluation.val`` or else of ``test_dataloader``.
        backbone (nn.Module): A ViT, whose image size is that of its positions, or another network,
            whose image size is what the transforms crop, or 224.

    Returns:
        dict: ``input_size``, ``mean`` and ``std`` of RGB between 0 and 1, ``interpolation``,
        ``crop_pct`` and ``crop_mode``.

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
    if _takes_bgr(cfg, channels):
        mean, std = mean.flip(0), std.flip(0)
    pipeline = ((cfg.get('evaluation') or {}).get('val') or {}).get('pipeline')
    if pipeline is None:
        pipeline = ((cfg.get('test_dataloader') or {}).get('dataset') or {}).get('pipeline') or []
    found = {str(x.get('type')).rpartition('.')[2]: x for x in pipeline}
    crop = found.get('CenterCrop', {}).get('crop_size')
    height, width = getattr(backbone, 'img_size', None) or _pair(crop or 224)
    resize = found.get('ResizeEdge', {})
    share, edge = 1.0, resize.get('scale')
    if crop and edge and resize.get('edge', 'short') == 'short':
        size = min(_pair(crop))
        share = size / edge
        if math.floor(size / share) != edge:  # as timm gets the edge from it
            share = size / (edge + 0.5)
    mode = resize.get('interpolation', 'bicubic')
    return dict(
        input_size=[channels, height, width],
        # As float32 knows them.
        mean=[float(f'{x:.7g}') for x in (mean.double() / 255).tolist()],
        std=[float(f'{x:.7g}') for x in (std.double() / 255).tolist()],
        interpolation=mode if mode in ('nearest', 'bilinear', 'bicubic', 'lanczos') else 'bicubic',
        crop_pct=share,
        crop_mode='center',
    )


def _timm_itself(backbone: SERTimmViT | SERTimmStages) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of what a backbone was built from, or of its late variant."""
    name = backbone.model.partition('.')[0]
    arguments = dict(backbone.model_args)
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise _refusal(backbone, 'timm', f'model_args that JSON cannot hold ({error})') from error
    if isinstance(backbone, SERTimmStages):
        return name, arguments
    _check_last_block(backbone)
    arguments.update(
        img_size=_unpair(backbone.img_size),
        global_pool={'cls_token': 'token', 'raw': ''}.get(backbone.out_type, 'avg'),
        fc_norm=not isinstance(backbone.fc_norm, nn.Identity),
    )
    if not backbone.cls_layer:
        return name, arguments
    block = backbone.blocks[0]
    arguments.update(
        patch_size=_unpair(backbone.patch_embed.patch_size),
        in_chans=backbone.patch_embed.proj.in_channels,
        embed_dim=backbone.embed_dims,
        depth=backbone.num_layers,
        num_heads=block.attn.num_heads,
        mlp_ratio=_ratio(block.mlp.fc1.out_features, backbone.embed_dims),
        qkv_bias=block.attn.qkv.bias is not None,
        init_values=None if isinstance(block.ls1, nn.Identity) else 1e-5,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        class_token=backbone.cls_token is not None,
        reg_tokens=0 if backbone.reg_token is None else backbone.reg_token.shape[1],
        pre_norm=not isinstance(backbone.norm_pre, nn.Identity),
        cls_layer=backbone.cls_layer,
    )
    return f'ser_vit_{_VIT_SIZES.get(backbone.embed_dims, "base")}_patch16_224', arguments


def _check_last_block(vit: VisionTransformer) -> None:
    if max(vit.out_indices) != vit.num_layers - 1:
        raise _refusal(vit, 'timm', f'out_indices={list(vit.out_indices)} without the last block')


def _ratio(hidden: int, channels: int) -> float:
    """What timm gets the number of hidden channels back from."""
    ratio = hidden / channels
    return ratio if int(channels * ratio) == hidden else (hidden + 0.5) / channels


def _timm_vit(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """The name of a ViT in timm, and the arguments that make it this one."""
    layer, conv = vit.layers[0], vit.patch_embed.projection
    _check_last_block(vit)
    if conv.stride != conv.kernel_size:
        raise _refusal(vit, 'timm', f'patches of {conv.kernel_size} in steps of {conv.stride}')
    if not hasattr(layer.ffn, 'feedforward_channels') or type(layer.ffn).__name__ != 'FFN':
        raise _refusal(vit, 'timm', f'an MLP of type {type(layer.ffn).__name__}')
    if layer.ln1.eps != 1e-6:
        raise _refusal(vit, 'timm', f'norm_cfg with eps={layer.ln1.eps}, not 1e-6,')
    channels = vit.embed_dims
    pooled = vit.out_type == 'avg_featmap'
    arguments = dict(
        img_size=_unpair(vit.img_size),
        patch_size=_unpair(conv.kernel_size),
        in_chans=conv.in_channels,
        embed_dim=channels,
        depth=vit.num_layers,
        num_heads=layer.attn.num_heads,
        mlp_ratio=_ratio(layer.ffn.feedforward_channels, channels),
        qkv_bias=layer.attn.qkv.bias is not None,
        init_values=1e-5 if hasattr(layer.attn.gamma1, 'weight') else None,
        class_token=vit.cls_token is not None,
        pre_norm=not isinstance(vit.pre_norm, nn.Identity),
        final_norm=vit.final_norm or pooled,
        fc_norm=pooled and not vit.final_norm,
        global_pool={'cls_token': 'token', 'raw': ''}.get(vit.out_type, 'avg'),
    )
    name = f'vit_{_VIT_SIZES.get(channels, "base")}_patch16_224'
    late = getattr(vit, 'cls_layer', 0)
    if late:
        arguments.update(cls_layer=late)
    if pooled and vit.final_norm:
        arguments.update(both_norms=True)
    own = late or 'both_norms' in arguments
    return f'ser_{name}' if own else name, arguments


def _check_resnet(backbone: nn.Module, to: str) -> None:
    """Refuse what is not the ResNet of timm and torchvision."""
    name = type(backbone).__name__
    if name not in ('ResNet', 'SERResNet'):
        can = 'a ResNet' if to == 'torchvision' else 'a ViT or a ResNet of MMPretrain or ser_mm'
        remedy = ' Export it to timm.' if to == 'torchvision' else ''
        raise ValueError(f'backbone.type={name} cannot be exported to {to}, only {can}.{remedy}')
    for field, plain in _PLAIN_RESNET.items():
        value = getattr(backbone, field)
        if (tuple(value) if isinstance(plain, tuple) else value) != plain:
            raise _refusal(backbone, to, f'{field}={value}')
    if not isinstance(backbone.norm1, _BatchNorm):
        raise _refusal(backbone, to, f'norm_cfg.type={backbone.norm_cfg["type"]}')
    if max(backbone.out_indices) != 3:
        raise _refusal(backbone, to, f'out_indices={tuple(backbone.out_indices)} without stage 4')


def _refusal(backbone: nn.Module, to: str, what: str, remedy: str = '') -> ValueError:
    remedy = remedy or 'use the checkpoint with ser_mm'
    return ValueError(
        f'{type(backbone).__name__} has {what}, which {to} has no network for; {remedy}.'
    )


@torch.no_grad()
def _filled(network: nn.Module, weights: dict, backbone: nn.Module, to: str) -> nn.Module:
    """The network with these weights, in eval mode, if it gives what the backbone gives."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f'{name} of the checkpoint has values that are infinite or NaN.')
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        told = ' '.join(str(error).split())
        raise _refusal(backbone, to, f'parameters ({told})') from error
    network.train(False)
    size = getattr(backbone, 'img_size', None) or (48, 64)
    channels = next(p for p in backbone.parameters() if p.ndim == 4).shape[1]
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(1, channels, *size, generator=rng, dtype=torch.float64)
    ours, theirs = (deepcopy(x).double() for x in (backbone, network))
    ours.train(False)
    expected, found = _feature(ours(images)), _feature(theirs(images))
    if expected.shape != found.shape or not torch.allclose(found, expected, 1e-8, 1e-8):
        apart = ''
        if expected.shape == found.shape:
            apart = f' by up to {(found - expected).abs().max():.1e}'
        raise _refusal(backbone, to, f'outputs that differ{apart}')
    return network


def _feature(outputs: Any) -> Tensor:
    """The vector of each image: the last output, or its mean over the places of a map."""
    last = outputs[-1] if isinstance(outputs, (tuple, list)) else outputs
    return last.mean(dim=(2, 3)) if last.ndim == 4 else last


def _first_conv(network: nn.Module) -> str:
    return next(name for name, x in network.named_modules() if isinstance(x, nn.Conv2d))


def _takes_bgr(cfg: Config, channels: int) -> bool:
    """Whether the network takes the channels in the order of the files' readers, BGR."""
    return channels == 3 and not build_preprocessor(cfg).to_rgb


def _take_rgb(conv: nn.Conv2d, cfg: Config) -> None:
    """Let a first layer take RGB, as other libraries give it."""
    if _takes_bgr(cfg, conv.in_channels):
        conv.weight.data = conv.weight.data.flip(1)


def _check_place(out: Path, to: str, checkpoint: str) -> None:
    """Refuse to write where something else is."""
    if to != 'timm':
        if out.is_dir():
            raise FileExistsError(f'{out} is a folder; name a file for an export to {to}.')
        if out.exists() and os.path.exists(checkpoint) and os.path.samefile(out, checkpoint):
            raise FileExistsError(f'{out} is the checkpoint itself; name another file.')
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


def _unpair(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _card(cfg: Config, checkpoint: str, config: dict, usage: str) -> str:
    """The model card: what it is, how it is loaded, what it takes."""
    data = config['pretrained_cfg']
    algorithm = (cfg.model.get('algorithm') or cfg.model).get('type')
    with_ser = ' with SER' if cfg.model.get('algorithm') else ''
    late = config['model_args'].get('cls_layer')
    size = ' x '.join(map(str, data['input_size'][1:]))
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
        f'- Images: RGB, {size}, mean {data["mean"]}, std {data["std"]} of values between 0 and 1.',
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
