"""Backbones with weights, and how timm loads what was exported of them."""

import timm
import torch
from mmengine.config import Config

from ser_mm.evaluation import build_backbone
from tests.support.algorithms import BACKBONE, PIXELS

VIT = {**BACKBONE, 'ser_layer': None}
# What both libraries compute of a few blocks, in float64, is the same sums in another order.
CLOSE = dict(rtol=1e-10, atol=1e-10)
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=40, edge='short', backend='pillow', interpolation='bilinear'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs'),
]


def config(backbone, **pixels):
    backbone = {**VIT, **backbone} if 'depth' not in backbone else backbone
    preprocessor = dict(type='SelfSupDataPreprocessor', **{**PIXELS, **pixels})
    dataset = dict(type='CustomDataset', data_root='x', pipeline=PIPELINE)
    model = dict(type='SimSiam', backbone=backbone, data_preprocessor=preprocessor)
    return Config(dict(model=model, evaluation=dict(val=dataset)))


def checkpoint(cfg, folder):
    """Of a network without a weight that is 0 or 1, and the network, in float64."""
    torch.manual_seed(0)
    network = build_backbone(cfg)
    for x in [*network.parameters(), *network.buffers()]:
        if x.is_floating_point():
            x.data = x.data + 0.2 * torch.rand_like(x)
    torch.save(
        dict(state_dict={f'backbone.{k}': v for k, v in network.state_dict().items()}),
        folder / 'run.pth',
    )
    return str(folder / 'run.pth'), network.double()


def images(*size, channels=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *size, generator=rng, dtype=torch.float64)


def load(folder, **options):
    """As the user does; the module beside the weights is registered in this process already."""
    name = f'local-dir:{folder}'
    return timm.create_model(name, pretrained=True, num_classes=0, **options).double().eval()


def feature(network, x):
    out = network(x)[-1]
    return out.mean(dim=(2, 3)) if out.ndim == 4 else out
