"""What backbones are compared by: images, and gradients of all parameters."""

import torch

from tests.support.algorithms import IMAGE


def images(n, height=IMAGE, width=IMAGE, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, height, width, generator=rng, dtype=torch.float64)


def gradients(network, outputs):
    """Of a fixed function of the outputs that treats every image and channel differently."""
    loss = sum((o * torch.linspace(-1, 2, o.numel()).view_as(o)).sum() for o in outputs)
    params = list(network.parameters())
    return torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
