"""What the core computes, written again from the definitions: slow, and with nothing shared."""

import math

import torch
import torch.nn.functional as F


def move(x, element):
    """D4 element of maps (..., H, W) by torch's own turns: flip left-right, then turn."""
    flips, turns = divmod(int(element), 4)
    return torch.rot90(x.flip(-1) if flips else x, turns, (-2, -1))


def inverse(element):
    """Number of the element that undoes it: flips undo themselves, turns turn back."""
    flips, turns = divmod(int(element), 4)
    return element if flips else (4 - turns) % 4


def relate(maps, element_1, element_2, size):
    """Maps of view 1 brought to view 2, one by one: back to the image, then the other element."""
    return torch.stack(
        [
            F.interpolate(move(move(x, inverse(a)), b)[None], size, mode='bicubic')[0]
            for x, a, b in zip(maps, element_1, element_2, strict=True)
        ]
    )


def info_nce(queries, keys, temperature, same_view=()):
    """The loss of one direction, query by query and key by key.

    Lists of maps (C, h, w), one per image, whose sizes may differ between images.
    """
    queries, keys, same_view = (
        [[t / t.norm() for t in x.flatten(1).t()] for x in maps]
        for maps in (queries, keys, same_view)
    )
    losses = []
    for image, tokens in enumerate(queries):
        for place, q in enumerate(tokens):
            positive = torch.exp(q @ keys[image][place] / temperature)
            total = positive
            for side in (keys, same_view):
                for other, others in enumerate(side):
                    if other != image:
                        for k in others:
                            total = total + torch.exp(q @ k / temperature)
            losses.append(-torch.log(positive / total))
    return sum(losses) / len(losses)


def resize_positions(positions, size):
    """Positions (1, C, h, w) on another grid, (1, L, C); MMPretrain resizes in float32."""
    resized = F.interpolate(positions.float(), size, mode='bicubic', align_corners=False)
    return resized.to(positions.dtype).flatten(2).transpose(1, 2)


def vit(network, images):
    """All block outputs of a ViT with [CLS] after block ``cls_layer``, in ordinary passes.

    Returns the tokens after each block, and height and width in tokens.
    """
    tokens, grid = network.patch_embed(images)
    extra = 1 if network.cls_token is not None and network.cls_layer == 0 else 0
    pos = network.pos_embed
    if tuple(grid) != tuple(network.patch_resolution):
        square = pos[:, extra:].unflatten(1, tuple(network.patch_resolution)).permute(0, 3, 1, 2)
        pos = torch.cat([pos[:, :extra], resize_positions(square, grid)], dim=1)
    cls = () if network.cls_token is None else network.cls_token.expand(len(images), -1, -1)
    if extra:
        tokens = torch.cat([cls, tokens], dim=1)
    tokens = tokens + pos
    outs = []
    for i, layer in enumerate(network.layers):
        if 0 < network.cls_layer == i:
            tokens = torch.cat([cls, tokens], dim=1)
        tokens = layer(tokens)
        outs.append(tokens)
    return outs, grid


def token_map(network, images):
    """Map of patch tokens (N, C, h, w) after block ``ser_layer``; of a ResNet, of the stage."""
    if hasattr(network, 'res_layers'):
        x = network.maxpool(network.relu(network.norm1(network.conv1(images))))
        for stage in network.res_layers[: network.ser_layer]:
            x = getattr(network, stage)(x)
        return x
    outs, (height, width) = vit(network, images)
    patches = outs[network.ser_layer - 1][:, -height * width :]
    return patches.transpose(1, 2).unflatten(2, (height, width))


def binomial_range(n, p, sigmas=5):
    """Counts that a binomial variable leaves with probability below 1e-6."""
    spread = sigmas * math.sqrt(n * p * (1 - p))
    return n * p - spread, n * p + spread


def float64_positions(monkeypatch):
    """MMPretrain casts positions to float32 to resize them; not here, where rounding matters."""
    monkeypatch.setattr(torch.Tensor, 'float', lambda tensor: tensor)
