"""A backbone as a network of timm, torchvision, MMPretrain or ONNX that gives the same features."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torchvision
from mmpretrain.models.backbones import ResNet, VisionTransformer
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ser_mm.checkpoint import to_timm_name
from ser_mm.models import SERTimmStages, SERTimmViT

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
_VIT_SIZES = {192: 'tiny', 384: 'small', 768: 'base', 1024: 'large'}


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


@torch.no_grad()
def to_onnx(network: nn.Module, size: Sequence[int]) -> Any:
    """The program of ONNX that gives what a network gives, for any number of images.

    Args:
        network (nn.Module): Gives a tensor of images; on the CPU, in eval mode.
        size (Sequence[int]): Channels, height and width of an image.

    Returns:
        onnx.ModelProto: With the input ``images``, float32, (N, C, H, W), and ``features``.

    Raises:
        ImportError: If onnx, onnxscript or onnxruntime is not installed.
        ValueError: If the network cannot be exported, or the program gives something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  which torch.onnx needs
    except ImportError as error:
        raise ImportError(
            'An export to ONNX needs onnx, onnxscript and onnxruntime, which are not all '
            "installed: run `pip install 'ser_mm[onnx]'`."
        ) from error
    _check_finite(network.state_dict())
    rng = torch.Generator().manual_seed(0)
    try:
        program = torch.onnx.export(
            network,
            (torch.randn(2, *size, generator=rng),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            input_names=['images'],
            output_names=['features'],
            verbose=False,
        ).model_proto
    except torch.onnx.OnnxExporterError as error:
        told = str(error).strip().splitlines()[0]
        raise _refusal(network, 'ONNX', f'operations that torch cannot export ({told})') from error
    session = onnxruntime.InferenceSession(program.SerializeToString())
    for count in (1, 3):  # other batches than that of the export
        images = torch.randn(count, *size, generator=rng)
        expected = network(images)
        found = torch.from_numpy(session.run(None, dict(images=images.numpy()))[0])
        # In float32 two libraries round in other places, but by far less.
        if found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=0, atol=1e-3 * float(expected.abs().max())
        ):
            raise _refusal(network, 'ONNX', f'outputs that differ for {count} images')
    return program


def _timm_itself(backbone: SERTimmViT | SERTimmStages) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of what a backbone was built from, or of its late variant."""
    name, arguments = backbone.model.partition('.')[0], dict(backbone.model_args)
    if backbone.model.startswith('local-dir:'):
        saved = json.loads(Path(backbone.model.partition(':')[2], 'config.json').read_text())
        name = saved['architecture'].partition('.')[0]
        arguments = {**saved.get('model_args', {}), **arguments}
        arguments.pop('num_classes', None)
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
    _check_finite(weights)
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


def _check_finite(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f'{name} of the checkpoint has values that are infinite or NaN.')


def _feature(outputs: Any) -> Tensor:
    """The vector of each image: the last output, or its mean over the places of a map."""
    last = outputs[-1] if isinstance(outputs, (tuple, list)) else outputs
    return last.mean(dim=(2, 3)) if last.ndim == 4 else last


def _unpair(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
