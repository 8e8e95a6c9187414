"""ViTs with a late [CLS] token for timm, in the folder of weights that ser_mm has exported.

It needs torch and timm alone. Import it before the folder is loaded:

    import sys, timm
    sys.path.insert(0, FOLDER)
    import ser_vit
    network = timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=0)
"""

from typing import Any

import torch
from timm.layers import PatchDropout
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class SERViT(VisionTransformer):
    """timm's ViT whose [CLS] token enters, without a position, after a block.

    Args:
        cls_layer (int): Block after which [CLS] enters, and registers with it. Defaults to 0:
            before the first, as usual.
        both_norms (bool): Norm the tokens, and what is pooled of them once more. Defaults to False.
        *args, **kwargs: Those of timm's ``VisionTransformer``.

    Raises:
        ValueError: If ``cls_layer`` is outside the network.
    """

    def __init__(self, *args, cls_layer: int = 0, both_norms: bool = False, **kwargs) -> None:
        if cls_layer:
            kwargs.update(no_embed_class=True)
        if both_norms:
            kwargs.update(fc_norm=False)
        super().__init__(*args, **kwargs)
        if not 0 <= cls_layer < len(self.blocks):
            raise ValueError(f'cls_layer={cls_layer}: choose 0 to {len(self.blocks) - 1}.')
        if both_norms:
            self.fc_norm = type(self.norm)(self.embed_dim)
        self.cls_layer = cls_layer
        if cls_layer:
            # By which another network refuses the weights.
            self.register_buffer('cls_after', torch.tensor(cls_layer))
            if isinstance(self.patch_drop, PatchDropout):
                self.patch_drop.num_prefix_tokens = 0

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = super()._pos_embed(x)
        # What has no position enters later.
        return x[:, self.num_prefix_tokens :] if self.cls_layer else x

    def _run(self, x: Tensor, upto: int) -> list[Tensor]:
        """The tokens after each of the first ``upto`` blocks."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        outs = []
        for i, block in enumerate(self.blocks[:upto]):
            if i == self.cls_layer > 0:
                prefix = [y for y in (self.cls_token, self.reg_token) if y is not None]
                x = torch.cat([*(y.expand(x.shape[0], -1, -1) for y in prefix), x], dim=1)
            saves = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
            outs.append(x)
        return outs

    def forward_features(
        self, x: Tensor, attn_mask: None = None, is_causal: bool = False
    ) -> Tensor:
        """All tokens, (N, L, C), after the last block and its norm."""
        if attn_mask is not None or is_causal:
            raise ValueError('attn_mask and is_causal are not for a ViT whose tokens get more.')
        return self.norm(self._run(x, len(self.blocks))[-1])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens after some blocks, as timm's ViT gives them.

        Before [CLS] is in, ``return_prefix_tokens`` gives (N, 0, C) with them.
        """
        if attn_mask is not None or is_causal:
            raise ValueError('attn_mask and is_causal are not for a ViT whose tokens get more.')
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt='{output_fmt}': choose 'NCHW' or 'NLC'.")
        height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        taken, last = feature_take_indices(len(self.blocks), indices)
        outs = self._run(x, last + 1 if stop_early else len(self.blocks))
        maps, prefixes = [], []
        for i in taken:
            tokens = self.norm(outs[i]) if norm else outs[i]
            prefix, patches = tokens.split([tokens.shape[1] - height * width, height * width], 1)
            if output_fmt == 'NCHW':
                patches = patches.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            maps.append(patches)
            prefixes.append(prefix)
        if output_dict:
            found = dict(image_intermediates=maps)
            if return_prefix_tokens and self.num_prefix_tokens:
                found.update(image_intermediates_prefix=prefixes)
            return found if intermediates_only else dict(found, image_features=self.norm(outs[-1]))
        if return_prefix_tokens and self.num_prefix_tokens:
            maps = list(zip(maps, prefixes, strict=True))
        return maps if intermediates_only else (self.norm(outs[-1]), maps)


def _create(variant: str, pretrained: bool, defaults: dict, given: dict) -> nn.Module:
    out_indices = given.pop('out_indices', 3)
    return build_model_with_cfg(
        SERViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **{'patch_size': 16, **defaults, **given},
    )


@register_model
def ser_vit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-Ti/16."""
    defaults = dict(embed_dim=192, depth=12, num_heads=3)
    return _create('ser_vit_tiny_patch16_224', pretrained, defaults, kwargs)


@register_model
def ser_vit_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-S/16."""
    defaults = dict(embed_dim=384, depth=12, num_heads=6)
    return _create('ser_vit_small_patch16_224', pretrained, defaults, kwargs)


@register_model
def ser_vit_base_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-B/16."""
    defaults = dict(embed_dim=768, depth=12, num_heads=12)
    return _create('ser_vit_base_patch16_224', pretrained, defaults, kwargs)


@register_model
def ser_vit_large_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """ViT-L/16."""
    defaults = dict(embed_dim=1024, depth=24, num_heads=16)
    return _create('ser_vit_large_patch16_224', pretrained, defaults, kwargs)
