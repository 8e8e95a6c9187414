import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import resize_pos_embed
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ser_mm.arguments import (
    InitCfg,
    ModuleCfg,
    Name,
    NaturalFloat,
    Positive,
    Share,
    Size,
    at_least,
    checked,
    filled,
)
from ser_mm.checkpoint import CheckpointError, StrictPretrained
from ser_mm.views import ViewBatch

Shapes = list[tuple[int, int]]
"""Images and tokens per image of each group in a packed sequence."""


@MODELS.register_module()
@checked(
    img_size=Size,
    patch_size=Size,
    in_channels=Positive,
    out_indices=int | Annotated[Sequence[int], filled],
    drop_rate=Share,
    drop_path_rate=Share,
    norm_cfg=ModuleCfg,
    out_type=Literal['cls_token', 'featmap', 'avg_featmap', 'raw'],
    frozen_stages=Annotated[int, at_least(-1)],
    interpolate_mode=Literal['bicubic', 'bilinear', 'nearest', 'nearest-exact', 'area'],
    layer_scale_init_value=NaturalFloat,
    patch_cfg=dict,
    layer_cfgs=dict | Annotated[Sequence[dict], filled],
)
class SERVisionTransformer(StrictPretrained, VisionTransformer):
    """MMPretrain's ViT with a late [CLS] token and a token map for SER (paper, Section 3).

    Called with images it is a ViT like any other. Called with a
    :class:`~ser_mm.views.ViewBatch` it embeds b1 and b2, of different sizes, in one pass: their
    tokens run through every layer as one packed sequence and part only for attention. The token
    map of b2 after block ``ser_layer`` is left in the container. On a CPU, where packing saves
    next to nothing, b1 and b2 run through every layer one after the other: packed sequences, of
    another length in every batch, would fragment its memory.

    Parameters are named and shaped as in ``VisionTransformer``. With ``cls_layer > 0`` the [CLS]
    token has no position, so ``pos_embed`` has one entry less, and the checkpoint holds
    ``cls_after``, by which a network that inserts the token elsewhere refuses it. Positions of a
    checkpoint are resized; as it does not tell their rows and columns, they are taken for those of
    this network where there are as many, and otherwise for those of a square.

    Args:
        arch (str | dict): Architecture, see ``VisionTransformer``. Defaults to 'deit-small'
            (ViT-S/16 with 6 heads).
        ser_layer (int, optional): Block after which b2's token map is taken, 1 to the number of
            blocks. Defaults to None: no token map, an ordinary ViT.
        cls_layer (int, optional): Block after which the [CLS] token is inserted, 0 (an ordinary
            ViT) to the number of blocks - 1. Defaults to None: that of ``ser_layer``, or 0.
        stop_grad_conv1 (bool): Keep the patch embedding as initialized, as MoCo v3 does.
            Defaults to False.
        with_cp (bool): Compute the inside of each block again in the backward pass, which saves
            memory. MMEngine's ``activation_checkpointing`` wraps the forward of a block, which is
            not called here. Defaults to False.
        linear_init (str): How Linear layers and [CLS] start without ``init_cfg``. 'xavier', as in
            MoCo v3: uniform, with q, k and v as separate matrices, and [CLS] next to 0.
            'trunc_normal', as in DeiT and DINO: with a standard deviation of 0.02. Defaults to
            'xavier'.
        pos_resize (str): How positions are resized for images of another size. 'mmpretrain', by
            interpolation alone. 'timm', smoothed before where the grid shrinks (antialias), which
            is what an exported network does in timm. Defaults to 'mmpretrain'.
        init_cfg (dict | list[dict], optional): As None, see ``linear_init``. ``dict(type=
            'Pretrained', checkpoint=..., prefix='backbone.')`` is strict: a parameter that is
            missing, unused or of another shape is an error. Defaults to None.
        **kwargs: Those of ``VisionTransformer``.

    Attributes:
        one_pass (bool, optional): Whether b1 and b2 are packed. None, as it begins: not on a CPU,
            unless the whole network is compiled.

    Raises:
        ValueError: If an argument is of another type, a layer is outside the network, the image
            size is not a multiple of the patch size, or [CLS] is asked for at an output before it
            is inserted.
    """

    one_pass: bool | None = None

    def __init__(
        self,
        arch: Name | Annotated[dict, filled] = 'deit-small',
        *args,
        ser_layer: int | None = None,
        cls_layer: int | None = None,
        stop_grad_conv1: bool = False,
        with_cp: bool = False,
        linear_init: Literal['xavier', 'trunc_normal'] = 'xavier',
        pos_resize: Literal['mmpretrain', 'timm'] = 'mmpretrain',
        init_cfg: InitCfg = None,
        **kwargs,
    ) -> None:
        super().__init__(arch, *args, init_cfg=init_cfg, **kwargs)
        for module in self.modules():
            if isinstance(module, DropPath):  # a number of NumPy's would break graphs
                module.drop_prob = float(module.drop_prob)
        self.linear_init = linear_init
        self.pos_resize = pos_resize
        if pos_resize == 'timm' and self.interpolate_mode not in ('bicubic', 'bilinear'):
            raise ValueError(
                f"SERVisionTransformer: pos_resize='timm' smooths, which interpolate_mode="
                f"'{self.interpolate_mode}' does not; use 'bicubic'."
            )
        depth = self.num_layers
        if ser_layer is not None and not 1 <= ser_layer <= depth:
            raise ValueError(
                f'SERVisionTransformer: ser_layer={ser_layer} is outside the network; choose a '
                f'block from 1 to {depth}.'
            )
        if cls_layer is None:
            cls_layer = 0 if ser_layer is None or self.cls_token is None else ser_layer
        self.cls_layer = cls_layer
        if not 0 <= self.cls_layer < depth:
            raise ValueError(
                f'SERVisionTransformer: cls_layer={self.cls_layer} is outside the network; choose '
                f'one from 0 (before the first block) to {depth - 1}.'
            )
        self.ser_layer = ser_layer
        self.with_cp = with_cp
        patch = self.patch_embed.projection.kernel_size
        if any(side % p for side, p in zip(self.img_size, patch, strict=True)):
            raise ValueError(
                f'SERVisionTransformer: img_size={self.img_size} is not a multiple of '
                f'patch_size={tuple(patch)}; change one of them.'
            )
        if self.cls_layer > 0:
            if self.cls_token is None:
                raise ValueError(
                    f'SERVisionTransformer: cls_layer={self.cls_layer} needs with_cls_token=True.'
                )
            if self.out_type == 'cls_token' and min(self.out_indices) < self.cls_layer:
                raise ValueError(
                    f'SERVisionTransformer: out_indices={list(self.out_indices)} asks for the '
                    f'[CLS] token before block {self.cls_layer + 1}, where it is first seen '
                    f"(cls_layer={self.cls_layer}); use later outputs or out_type='featmap'."
                )
            self.pos_embed = nn.Parameter(
                self.pos_embed.detach()[:, 1:].clone(memory_format=torch.contiguous_format),
                self.pos_embed.requires_grad,
            )
            self.register_buffer('cls_after', torch.tensor(self.cls_layer))
        if stop_grad_conv1:
            self.patch_embed.requires_grad_(False)

    @property
    def image_channels(self) -> int:
        """Channels of images."""
        return next(self.patch_embed.parameters()).shape[1]

    @property
    def token_map_channels(self) -> int | None:
        """Channels of the token map; None without ``ser_layer``."""
        return None if self.ser_layer is None else self.embed_dims

    @property
    def token_map_stride(self) -> int:
        """Pixels per token of the token map."""
        return self.patch_embed.projection.stride[0]

    @property
    def feature_channels(self) -> int:
        """Channels of what :meth:`features` gives."""
        return self.embed_dims

    def init_weights(self) -> None:
        """Initialize by ``linear_init``, by ``init_cfg``, or strictly from a checkpoint."""
        super().init_weights()
        if self.init_cfg is not None:
            return
        xavier = self.linear_init == 'xavier'
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6 if xavier else 0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                for matrix in module.weight.chunk(3 if name.endswith('qkv') else 1):
                    if xavier:
                        nn.init.xavier_uniform_(matrix)
                    else:
                        nn.init.trunc_normal_(matrix, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> 'SERVisionTransformer':
        """Set the mode, but of frozen stages, whose dropout and drop path stay off."""
        super().train(mode)
        if self.frozen_stages > 0:
            self._freeze_stages()
        return self

    def compile(self, *args, **kwargs) -> None:
        """Compile the inside of a block, in place: few, small graphs that all blocks share.

        A graph of all blocks is ``torch.compile(backbone)``, which takes as many times as long to
        make.

        Args:
            *args: Those of ``torch.compile``.
            **kwargs: Likewise. ``dynamic`` defaults to True, as grids of b2 change.
        """
        kwargs.setdefault('dynamic', True)
        compiled = torch.compile(type(self)._run_layer, *args, **kwargs)
        self._run_layer = compiled  # type: ignore[method-assign]

    def __getstate__(self) -> dict:
        """Compiled code is not part of copies and files, as in torch."""
        return {key: x for key, x in super().__getstate__().items() if key != '_run_layer'}

    def _prepare_pos_embed(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        """Before loading: refuse a [CLS] token inserted elsewhere, and resize the positions."""
        name = f'{prefix}pos_embed'
        if name not in state_dict or state_dict[name].ndim != 3:
            return
        cls_after = int(state_dict.get(f'{prefix}cls_after', 0))
        if cls_after != self.cls_layer:
            raise CheckpointError(
                f'{type(self).__name__}: the checkpoint inserts [CLS] after block {cls_after}, '
                f'this backbone after block {self.cls_layer}; set cls_layer={cls_after}.'
            )
        one_more = state_dict[name].shape[1] == self.pos_embed.shape[1] + 1
        if self.cls_token is None and one_more:  # that of [CLS], left out as MMPretrain does
            state_dict[name] = state_dict[name][:, 1:]
        count = state_dict[name].shape[1] - self._extra_positions
        if count == math.prod(self.patch_resolution):
            return
        side = math.isqrt(max(count, 0))
        if side * side != count or not side:  # MMEngine would leave random ones, and go on
            known = self.state_dict().keys()
            names = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
            others = ', '.join([key for key in names if key not in known][:3])
            raise CheckpointError(
                f'{type(self).__name__}: the checkpoint has positions of {count} patches, neither '
                f'the {math.prod(self.patch_resolution)} of this network nor a square; use the '
                f'backbone config that it was trained with{others and f" (it has {others})"}.'
            )
        state_dict[name] = self._resize(state_dict[name], (side, side), self.patch_resolution)

    @property
    def _extra_positions(self) -> int:
        return 0 if self.cls_layer else self.num_extra_tokens

    def _resize(self, positions: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
        """Positions (1, L, C) of the grid ``old``, those of extra tokens first, for ``new``."""
        extra, mode = self._extra_positions, self.interpolate_mode
        if self.pos_resize == 'mmpretrain':
            return resize_pos_embed(positions, old, new, mode, extra)
        if tuple(old) == tuple(new):
            return positions
        # As MMPretrain and timm do, in float32.
        grid = positions[:, extra:].unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, tuple(new), mode=mode, antialias=True)
        return torch.cat([positions[:, :extra], grid.flatten(2).mT.to(positions)], dim=1)

    def forward(self, x: Tensor | ViewBatch) -> tuple[Tensor, ...]:
        """Embed images.

        Args:
            x (Tensor | ViewBatch): Images (N, 3, H, W), or b1 and b2.

        Returns:
            tuple[Tensor]: One output per ``out_indices``, as ``VisionTransformer`` gives for
            ``out_type``; for a ViewBatch, the embeddings of b1, then those of b2.

        Raises:
            ValueError: If a ViewBatch meets an ``out_type`` whose shape depends on the image size.
        """
        groups = [x]
        if isinstance(x, ViewBatch):
            if self.out_type not in ('cls_token', 'avg_featmap'):
                raise ValueError(
                    f"{type(self).__name__}: out_type='{self.out_type}' cannot hold b1 and b2, "
                    "which differ in size; pretrain with 'cls_token' or 'avg_featmap'."
                )
            groups = [images for images in (x.base, x.equi) if len(images)]
        passes = [groups] if self._packs(groups) else [[images] for images in groups]
        packs = [self._embed(groups) for groups in passes]
        outs = []
        for i in range(self.num_layers):
            packs = [(*self._run_block(i, *pack), grids) for *pack, grids in packs]
            if i + 1 == self.ser_layer and isinstance(x, ViewBatch):
                x.token_maps[self] = self._token_map(x, *packs[-1])
                if x.wants_features:
                    x.features[self] = _cat([self._pool(*pack) for pack in packs])
            if i == self.num_layers - 1 and self.final_norm:
                packs = [(self.ln1(tokens), *rest) for tokens, *rest in packs]
            if i in self.out_indices:
                images = [
                    self._format_output(images, grid)
                    for tokens, shapes, grids in packs
                    for images, grid in zip(_unpack(tokens, shapes), grids, strict=True)
                ]
                outs.append(_cat(images))
        if self.ser_layer is None and isinstance(x, ViewBatch) and x.wants_features:
            x.features[self] = outs[-1]
        return tuple(outs)

    def features(self, images: Tensor) -> Tensor:
        """What an equivariance objective sees of images, by the blocks that it takes alone.

        Without ``ser_layer`` the last output. With it, after that block, the [CLS] token, or the
        mean of the patch tokens where [CLS] is not in yet.

        Args:
            images (Tensor): (N, 3, H, W).

        Returns:
            Tensor: (N, C).
        """
        if self.ser_layer is None:
            return self(images)[-1]
        tokens, shapes, grids = self._embed([images])
        for i in range(self.ser_layer):
            tokens, shapes = self._run_block(i, tokens, shapes)
        return self._pool(tokens, shapes, grids)

    def _packs(self, groups: list[Tensor]) -> bool:
        if self.one_pass is None:
            return torch.compiler.is_compiling() or groups[0].device.type != 'cpu'
        return self.one_pass

    def _embed(self, groups: list[Tensor]) -> tuple[Tensor, Shapes, Shapes]:
        """Patches and positions: packed tokens (T, C), their shapes, and the grid per group."""
        packed, shapes, grids = [], [], []
        for images in groups:
            tokens, grid = self.patch_embed(images)
            if self.cls_layer == 0 and self.cls_token is not None:
                cls_token = self.cls_token.expand(tokens.shape[0], -1, -1)
                tokens = torch.cat([cls_token, tokens], dim=1)
            tokens = tokens + self._positions(grid, images is groups[0])
            packed.append(tokens.flatten(0, 1))
            shapes.append(tuple(tokens.shape[:2]))
            grids.append(grid)
        return self.pre_norm(self.drop_after_pos(_cat(packed))), shapes, grids

    def _positions(self, grid: tuple[int, int], of_base: bool) -> Tensor:
        """Position of each token, (1, L, C), interpolated where the grid is another one.

        For b2 compiled code interpolates always, which changes nothing on the same grid: it would
        need a graph for each side that is equal or not.
        """
        if of_base or not torch.compiler.is_compiling():
            return self._resize(self.pos_embed, self.patch_resolution, grid)
        places = math.prod(self.patch_resolution)
        extra, patches = self.pos_embed.split([self.pos_embed.shape[1] - places, places], dim=1)
        patches = patches.unflatten(1, self.patch_resolution).permute(0, 3, 1, 2)
        options = {}
        if self.interpolate_mode in ('bicubic', 'bilinear'):
            options = dict(align_corners=False, antialias=self.pos_resize == 'timm')
        resized = F.interpolate(patches.float(), grid, mode=self.interpolate_mode, **options)
        resized = resized.flatten(2).transpose(1, 2).to(patches.dtype)
        return torch.cat([extra, resized], dim=1)

    def _insert_cls(self, tokens: Tensor, shapes: Shapes) -> tuple[Tensor, Shapes]:
        images = [
            torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1).flatten(0, 1)
            for x in _unpack(tokens, shapes)
        ]
        return _cat(images), [(n, length + 1) for n, length in shapes]

    def _run_block(self, i: int, tokens: Tensor, shapes: Shapes) -> tuple[Tensor, Shapes]:
        """Encoder layer ``i``, and [CLS] in front of it where that is its place."""
        if i == self.cls_layer > 0:
            tokens, shapes = self._insert_cls(tokens, shapes)
        if self.with_cp and torch.is_grad_enabled():
            layer = self.layers[i]
            return checkpoint(self._run_layer, layer, tokens, shapes, use_reentrant=False), shapes
        return self._run_layer(self.layers[i], tokens, shapes), shapes

    @staticmethod
    def _run_layer(layer: TransformerEncoderLayer, tokens: Tensor, shapes: Shapes) -> Tensor:
        """One encoder layer: all of it per token, but for attention (and drop path, per image)."""
        attn = layer.attn

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.unflatten(2, (3, attn.num_heads, attn.head_dims)).permute(2, 0, 3, 1, 4)
            dropout = attn.attn_drop if attn.training else 0.0
            mixed = attn.scaled_dot_product_attention(*heads.unbind(), dropout_p=dropout)
            return mixed.transpose(1, 2).flatten(2)

        qkv = _unpack(attn.qkv(layer.ln1(tokens)), shapes)
        mixed = [attend(x).flatten(0, 1) for x in qkv]
        update = attn.gamma1(attn.proj_drop(_linear_of_parts(attn.proj, mixed)))
        tokens = tokens + _drop_path(attn.out_drop, update, shapes)
        update = layer.ffn.gamma2(layer.ffn.layers(layer.ln2(tokens)))
        return tokens + _drop_path(layer.ffn.dropout_layer, update, shapes)

    def _token_map(self, x: ViewBatch, tokens: Tensor, shapes: Shapes, grids: Shapes) -> Tensor:
        if not len(x.equi):
            grid = [side // self.token_map_stride for side in x.equi.shape[-2:]]
            return tokens.new_zeros(0, self.embed_dims, *grid)
        height, width = grids[-1]
        patches = _unpack(tokens, shapes)[-1][:, -height * width :]
        if not torch.is_grad_enabled():  # nothing else keeps the tokens of b1: nor does the map
            patches = patches.clone()
        return patches.transpose(1, 2).unflatten(2, (height, width))

    def _pool(self, tokens: Tensor, shapes: Shapes, grids: Shapes) -> Tensor:
        """The feature of each image, (N, C): [CLS] if there, else the mean of the patches."""
        with_cls = [length > h * w for (_, length), (h, w) in zip(shapes, grids, strict=True)]
        images = zip(_unpack(tokens, shapes), with_cls, strict=True)
        return _cat([x[:, 0] if cls else x.mean(dim=1) for x, cls in images])

    def _format_output(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class, where the number of extra tokens depends on the layer."""
        patches = x[:, x.shape[1] - hw[0] * hw[1] :]
        if self.out_type == 'featmap':
            return patches.transpose(1, 2).unflatten(2, hw)
        if self.out_type == 'avg_featmap':
            return self.ln2(patches.mean(dim=1))
        return x if self.out_type == 'raw' else x[:, 0]


def _unpack(tokens: Tensor, shapes: Shapes) -> list[Tensor]:
    """Packed tokens (T, C) as one (N, L, C) per group."""
    groups = tokens.split([n * length for n, length in shapes])
    return [x.unflatten(0, shape) for x, shape in zip(groups, shapes, strict=True)]


def _linear_of_parts(layer: nn.Module, parts: list[Tensor]) -> Tensor:
    """A linear layer on the concatenation of parts that the backward pass keeps anyway."""
    # Not what LoRA, say, puts in its place, nor what hooks watch or change (pruning, probes); and
    # what compiled code keeps, its compiler decides.
    plain = type(layer) is nn.Linear and not (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
    )
    if len(parts) == 1 or not plain or torch.compiler.is_compiling() or _will_be_cast(parts[0]):
        return layer(_cat(parts))
    dtype = parts[0].dtype  # under autocast not that of the parameters
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return _LinearOfParts.apply(layer.weight.to(dtype), bias, *parts)


def _will_be_cast(part: Tensor) -> bool:
    """Whether autocast casts it for a layer: it leaves float32 behind norms on a GPU."""
    device = part.device.type
    return (
        part.dtype is torch.float32
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    )


class _LinearOfParts(torch.autograd.Function):
    """Does not keep the concatenation, but makes it again in the backward pass.

    Attention keeps its output for its own backward pass. With one group of images the layer that
    takes it keeps the same memory; a concatenation of groups would be kept beside them, which is
    7 % of all that a step keeps.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        return F.linear(torch.cat(parts), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        weight, _, *parts = inputs
        ctx.save_for_backward(weight, *parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        of_weight, of_bias, *of_parts = ctx.needs_input_grad
        to_parts: Sequence[Tensor | None] = [None] * len(parts)
        if any(of_parts):
            to_parts = (gradient @ weight).split([len(x) for x in parts])
        return (
            gradient.t() @ torch.cat(parts) if of_weight else None,
            gradient.sum(0) if of_bias else None,
            *to_parts,
        )


def _drop_path(drop: nn.Module, update: Tensor, shapes: Shapes) -> Tensor:
    """Drop path, which draws for an image, on packed tokens (T, C)."""
    if not (drop.training and getattr(drop, 'drop_prob', 0)):
        return update
    kept = drop(update.new_ones(sum(n for n, _ in shapes), 1)).split([n for n, _ in shapes])
    tokens = [x.expand(-1, length) for x, (_, length) in zip(kept, shapes, strict=True)]
    return update * _cat([x.reshape(-1, 1) for x in tokens])


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
