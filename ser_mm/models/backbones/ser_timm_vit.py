from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ser_mm.arguments import InitCfg, Name, checked, filled

from .ser_vit import SERVisionTransformer, Shapes, _cat, _drop_path, _linear_of_parts, _unpack


def create_timm(owner: str, model: str, arguments: dict[str, Any] | None) -> nn.Module:
    """A network of timm without a classifier and without its weights; nothing is downloaded.

    Args:
        owner (str): Class that asks for it, for the message.
        model (str): Name in timm, with or without a tag, or 'local-dir:FOLDER'.
        arguments (dict, optional): Of ``timm.create_model``.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If timm has no such network, it does not take the arguments, or weights are
            asked for.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"{owner}: model='{model}' needs timm, which is not installed: run `pip install "
            "'ser_mm[timm]'`."
        ) from error
    arguments = dict(arguments or {})
    fetched = [k for k in ('pretrained', 'checkpoint_path') if arguments.pop(k, None)]
    if fetched or model.startswith('hf'):
        what = f'model_args.{fetched[0]}' if fetched else f"model='{model}'"
        raise ValueError(
            f'{owner}: {what} loads weights, which is left to init_cfg: download them, and set '
            "init_cfg=dict(type='Pretrained', checkpoint=FILE)."
        )
    name = model.partition('.')[0]
    if ':' not in model and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), 3)
        remedy = f'close to it: {", ".join(near)}' if near else 'see timm.list_models()'
        raise ValueError(f"{owner}: model='{model}' is not in timm {timm.__version__}; {remedy}.")
    arguments['num_classes'] = 0
    try:
        return timm.create_model(model, **arguments)
    except (AssertionError, RuntimeError, TypeError, ValueError, FileNotFoundError) as error:
        told = str(error).partition('\n')[0].rstrip('.')
        raise ValueError(
            f"{owner}: timm cannot build model='{model}' with model_args={arguments}: {told}."
        ) from error


@MODELS.register_module()
@checked
class SERTimmViT(SERVisionTransformer):
    """A ViT of timm, with a late [CLS] token and a token map for SER.

    It does what :class:`~ser_mm.models.SERVisionTransformer` does, with the parts of a network of
    timm, whose parameters keep their names. What differs from MMPretrain's ViT is kept: registers,
    norms of queries and keys, gated MLPs, how positions are resized. Blocks of another kind than
    timm's ``Block`` with its ``Attention`` run for b1 and b2 one after the other.

    With ``cls_layer > 0`` [CLS] and registers enter together, without positions, after that block.

    Args:
        model (str): Name in timm, e.g. 'vit_tiny_patch16_224', with or without a tag.
        ser_layer (int, optional): Block after which b2's token map is taken, 1 to the number of
            blocks. Defaults to None: no token map, an ordinary ViT.
        cls_layer (int, optional): Block after which [CLS] enters, 0 (before the first) to the
            number of blocks - 1. Defaults to None: that of ``ser_layer``, or 0.
        out_type (str, optional): 'cls_token', 'avg_featmap', 'featmap' or 'raw', see
            ``VisionTransformer``. Defaults to None: as the network pools in timm.
        out_indices (int | Sequence[int]): Blocks whose outputs are given, from 0; negative ones
            count from the last. Defaults to -1.
        stop_grad_conv1 (bool): Keep the patch embedding as initialized, as MoCo v3 does.
            Defaults to False.
        with_cp (bool): Compute the inside of each block again in the backward pass, which saves
            memory. Defaults to False.
        model_args (dict, optional): Those of ``timm.create_model``, e.g. ``dict(img_size=96,
            drop_path_rate=0.1, weight_init='moco')``. Defaults to None.
        init_cfg (dict | list[dict], optional): ``dict(type='Pretrained', checkpoint=FILE)`` loads
            timm's weights, strictly. Defaults to None: as timm initializes.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If an argument is of another type, timm has no such network, the network is no
            ViT of this kind, or a layer is outside of it.
    """

    def __init__(
        self,
        model: Name,
        ser_layer: int | None = None,
        cls_layer: int | None = None,
        out_type: Literal['cls_token', 'avg_featmap', 'featmap', 'raw'] | None = None,
        out_indices: int | Annotated[Sequence[int], filled] = -1,
        stop_grad_conv1: bool = False,
        with_cp: bool = False,
        model_args: dict | None = None,
        init_cfg: InitCfg = None,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        arguments = {'dynamic_img_size': True, **(model_args or {})}
        try:
            vit = create_timm('SERTimmViT', model, arguments)
        except ValueError as error:
            if 'dynamic_img_size' not in str(error.__cause__):
                raise
            told = 'no ViT whose positions are resized (dynamic_img_size)'
            raise _refusal(model, f'{told}; a ResNet or ConvNeXt is for SERTimmStages') from None
        _check(model, vit)
        self.embed_dims, self.num_layers = vit.embed_dim, len(vit.blocks)
        self.patch_resolution, self.img_size = vit.patch_embed.grid_size, vit.patch_embed.img_size
        self.num_extra_tokens = vit.num_prefix_tokens
        self.pos_resize, self.interpolate_mode = 'timm', 'bicubic'
        self.frozen_stages, self.final_norm, self.with_cp = -1, True, with_cp
        if cls_layer is None:
            cls_layer = 0 if ser_layer is None or not self.num_extra_tokens else ser_layer
        for name, layer, low in (('ser_layer', ser_layer, 1), ('cls_layer', cls_layer, 0)):
            last = self.num_layers - 1 + low
            if layer is not None and not low <= layer <= last:
                raise ValueError(
                    f'SERTimmViT: {name}={layer} is outside the network; choose one from {low} to '
                    f'{last}.'
                )
        self.ser_layer, self.cls_layer = ser_layer, cls_layer
        if cls_layer and not self.num_extra_tokens:
            raise ValueError(
                f"SERTimmViT: cls_layer={cls_layer} needs a [CLS] token, and model='{model}' has "
                'none; leave cls_layer out.'
            )
        self.out_type = out_type or {'token': 'cls_token'}.get(vit.global_pool, 'avg_featmap')
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        self.out_indices = [i + self.num_layers if i < 0 else i for i in indices]
        if not all(0 <= i < self.num_layers for i in self.out_indices):
            raise ValueError(
                f'SERTimmViT: out_indices={out_indices} is outside the network; choose from '
                f'0 to {self.num_layers - 1}.'
            )
        if self.out_type == 'cls_token':
            if vit.cls_token is None:
                raise ValueError(
                    f"SERTimmViT: out_type='cls_token', and model='{model}' has no [CLS] token; "
                    "use 'avg_featmap'."
                )
            if min(self.out_indices) < cls_layer:
                raise ValueError(
                    f'SERTimmViT: out_indices={self.out_indices} asks for the [CLS] token before '
                    f'it enters (cls_layer={cls_layer}); use later outputs or '
                    "out_type='featmap'."
                )
        # The parts alone, so that parameters have timm's names.
        for part in ('patch_embed', 'pos_drop', 'norm_pre', 'blocks', 'norm', 'fc_norm'):
            setattr(self, part, getattr(vit, part))
        for part in ('cls_token', 'reg_token', 'pos_embed'):
            self.register_parameter(part, getattr(vit, part))
        self.model, self.model_args = model, dict(model_args or {})
        has_positions = self.pos_embed is not None
        self._extra = self.num_extra_tokens if has_positions and not vit.no_embed_class else 0
        if cls_layer:
            if self._extra:
                positions = self.pos_embed.detach()[:, self._extra :]
                self.pos_embed = nn.Parameter(
                    positions.clone(memory_format=torch.contiguous_format)
                )
                self._extra = 0
            self.register_buffer('cls_after', torch.tensor(cls_layer))
        self._register_load_state_dict_pre_hook(self._prepare_pos_embed)
        if stop_grad_conv1:
            self.patch_embed.requires_grad_(False)

    @property
    def token_map_stride(self) -> int:
        """Pixels per token of the token map."""
        return self.patch_embed.patch_size[0]

    # What MMPretrain calls the parts.
    layers = property(lambda self: self.blocks)
    ln1 = property(lambda self: self.norm)
    ln2 = property(lambda self: self.fc_norm)

    def init_weights(self) -> None:
        """Initialize by ``init_cfg``; without one timm has done it."""
        super(SERVisionTransformer, self).init_weights()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """The depth of a parameter, for decay of the learning rate by layer.

        Args:
            param_name (str): Its name.
            prefix (str): What the name starts with before those of the backbone. Defaults to ''.

        Returns:
            tuple[int, int]: The depth, 0 for patches and positions, and the number of depths.
        """
        depths = self.num_layers + 2
        name = param_name.removeprefix(prefix)
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) + 1, depths
        return (depths - 1 if name.startswith(('norm.', 'fc_norm.')) else 0), depths

    @property
    def _extra_positions(self) -> int:
        return self._extra

    def _prepare_pos_embed(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        if self.pos_embed is not None:
            super()._prepare_pos_embed(state_dict, prefix, *args, **kwargs)

    def _embed(self, groups: list[Tensor]) -> tuple[Tensor, Shapes, Shapes]:
        packed, shapes, grids = [], [], []
        for images in groups:
            tokens = self.patch_embed(images)  # (N, h, w, C)
            grid = tuple(tokens.shape[1:3])
            tokens = tokens.flatten(1, 2)
            if self._extra:
                tokens = self._with_prefix(tokens)
            if self.pos_embed is not None:
                tokens = tokens + self._resize(self.pos_embed, self.patch_resolution, grid)
            if self.cls_layer == 0 and not self._extra:
                tokens = self._with_prefix(tokens)
            packed.append(tokens.flatten(0, 1))
            shapes.append(tuple(tokens.shape[:2]))
            grids.append(grid)
        return self.norm_pre(self.pos_drop(_cat(packed))), shapes, grids

    def _with_prefix(self, tokens: Tensor) -> Tensor:
        """[CLS] and registers, where there are, in front of tokens (N, L, C)."""
        prefix = [x for x in (self.cls_token, self.reg_token) if x is not None]
        return torch.cat([*(x.expand(tokens.shape[0], -1, -1) for x in prefix), tokens], dim=1)

    def _insert_cls(self, tokens: Tensor, shapes: Shapes) -> tuple[Tensor, Shapes]:
        images = [self._with_prefix(x) for x in _unpack(tokens, shapes)]
        return _cat([x.flatten(0, 1) for x in images]), [tuple(x.shape[:2]) for x in images]

    @staticmethod
    def _run_layer(layer: nn.Module, tokens: Tensor, shapes: Shapes) -> Tensor:
        if not _can_be_packed(layer):
            return _cat([layer(x).flatten(0, 1) for x in _unpack(tokens, shapes)])
        attn = layer.attn

        def attend(qkv: Tensor) -> Tensor:
            heads = qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
            queries, keys, values = heads.unbind()
            dropout = attn.attn_drop.p if attn.training else 0.0
            mixed = F.scaled_dot_product_attention(
                attn.q_norm(queries), attn.k_norm(keys), values, dropout_p=dropout
            )
            return mixed.transpose(1, 2).flatten(2)

        qkv = _unpack(attn.qkv(layer.norm1(tokens)), shapes)
        mixed = [attn.norm(attend(x)).flatten(0, 1) for x in qkv]
        update = layer.ls1(attn.proj_drop(_linear_of_parts(attn.proj, mixed)))
        tokens = tokens + _drop_path(layer.drop_path1, update, shapes)
        update = layer.ls2(layer.mlp(layer.norm2(tokens)))
        return tokens + _drop_path(layer.drop_path2, update, shapes)

    def _pool(self, tokens: Tensor, shapes: Shapes, grids: Shapes) -> Tensor:
        images = zip(_unpack(tokens, shapes), grids, strict=True)
        return _cat([self._summary(x, h * w) for x, (h, w) in images])

    def _summary(self, x: Tensor, patches: int) -> Tensor:
        has_cls = self.cls_token is not None and x.shape[1] > patches
        return x[:, 0] if has_cls else x[:, x.shape[1] - patches :].mean(dim=1)

    def _format_output(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.out_type == 'cls_token':
            return self.fc_norm(x[:, 0])
        return super()._format_output(x, hw)


def _can_be_packed(block: nn.Module) -> bool:
    """Whether all of a block but its attention is per token, and attention is the usual one."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    usual = type(block) is Block and type(block.attn) is Attention
    return usual and getattr(block.attn, 'gate', None) is None


def _check(model: str, network: nn.Module) -> None:
    """Refuse what is no ViT of timm's ``VisionTransformer``, or does what a packed pass cannot."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if type(network) is not VisionTransformer:
        raise _refusal(model, f'a {type(network).__name__}, not a plain VisionTransformer')
    if type(network.patch_embed) is not PatchEmbed:
        raise _refusal(model, f'a ViT on a {type(network.patch_embed).__name__}, not on patches')
    if network.patch_embed.dynamic_img_pad or not network.dynamic_img_size:
        raise _refusal(model, 'built with dynamic_img_pad=True or dynamic_img_size=False')
    if not isinstance(network.patch_drop, nn.Identity):
        raise _refusal(model, 'built with patch_drop_rate, which leaves holes in the token map')
    if network.global_pool not in ('token', 'avg'):
        raise _refusal(
            model,
            f"pooled by global_pool='{network.global_pool}'; set model_args=dict(global_pool="
            "'avg')",
        )


def _refusal(model: str, what: str) -> ValueError:
    return ValueError(f"SERTimmViT: model='{model}' cannot be used, it is {what}.")
