"""Tiny SER-wrapped algorithms; tests of the core run on every one of them.

To add an algorithm, add it to ``BASES``, or its whole config to ``ALGORITHMS``.
"""

import torch
from mmengine.logging import MessageHub
from mmpretrain.registry import MODELS

import ser_mm  # noqa: F401  registers the modules
from ser_mm.views import ViewBatch

EMBED_DIMS, PATCH, IMAGE = 48, 8, 32

BACKBONE = dict(
    type='SERVisionTransformer',
    arch=dict(embed_dims=EMBED_DIMS, num_layers=4, num_heads=3, feedforward_channels=96),
    img_size=IMAGE,
    patch_size=PATCH,
    ser_layer=2,
)
# Its token map has the stride and the channels of the ViT's. Its norm looks at one image at a time,
# so that what is computed of an image does not depend on the others on its rank.
RESNET = dict(
    type='SERResNet',
    depth=18,
    stem_channels=12,
    base_channels=24,
    norm_cfg=dict(type='GN', num_groups=4),
    ser_layer=2,
)
# MMPretrain's own preprocessor arguments, the same for a baseline and for SER.
PIXELS = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def mlp(in_channels=32, num_layers=2, **options):
    """Projector or predictor; ``norm_cfg`` has to serve one CPU process."""
    return {
        **dict(
            type='NonLinearNeck',
            in_channels=in_channels,
            hid_channels=64,
            out_channels=32,
            num_layers=num_layers,
            with_avg_pool=False,
            with_last_bn_affine=False,
            norm_cfg=dict(type='BN1d'),
        ),
        **options,
    }


def with_ser(algorithm, **options):
    """The algorithm in SER, with options of SERAlgorithm."""
    return {
        **dict(
            type='SERAlgorithm',
            algorithm=algorithm,
            neck=dict(type='SERNeck', in_channels=EMBED_DIMS, hid_channels=40, out_channels=24),
            head=dict(type='SERHead', temperature=0.5),
            data_preprocessor=dict(type='SERDataPreprocessor', patch_size=PATCH, **PIXELS),
        ),
        **options,
    }


def latent_predict_head():
    loss = dict(type='CosineSimilarityLoss')
    return dict(type='LatentPredictHead', predictor=mlp(), loss=loss)


def mocov3(backbone, neck):
    return dict(
        type='MoCoV3',
        base_momentum=0.01,
        backbone=backbone,
        neck=dict(neck, num_layers=3),
        head=dict(
            type='MoCoV3Head',
            predictor=mlp(),
            loss=dict(type='CrossEntropyLoss', loss_weight=0.4),
            temperature=0.2,
        ),
    )


def byol(backbone, neck):
    head = latent_predict_head()
    return dict(type='BYOL', base_momentum=0.01, backbone=backbone, neck=neck, head=head)


def simsiam(backbone, neck):
    return dict(type='SimSiam', backbone=backbone, neck=neck, head=latent_predict_head())


def barlowtwins(backbone, neck):
    loss = dict(type='CrossCorrelationLoss')
    head = dict(type='CrossCorrelationHead', in_channels=32, loss=loss)
    return dict(type='BarlowTwins', backbone=backbone, neck=neck, head=head)


def dino(backbone, neck):
    return dict(
        type='DINO',
        base_momentum=0.01,
        backbone=backbone,
        neck=dict(
            type='DINONeck',
            in_channels=neck['in_channels'],
            hid_channels=64,
            bottleneck_channels=16,
            out_channels=40,
            fixed_norm=False,
            with_avg_pool=neck['with_avg_pool'],
        ),
        head=dict(type='DINOHead', out_channels=40),
    )


BASES = dict(mocov3=mocov3, byol=byol, simsiam=simsiam, barlowtwins=barlowtwins, dino=dino)

ALGORITHMS = {
    **{name: with_ser(base(BACKBONE, mlp(EMBED_DIMS))) for name, base in BASES.items()},
    **{
        f'{name}_resnet': with_ser(base(RESNET, mlp(192, with_avg_pool=True)))
        for name, base in BASES.items()
    },
}


def build(config, max_iters=100):
    """Build and initialize a model; momentum schedules read ``max_iters`` from the message hub."""
    MessageHub.get_current_instance().update_info('max_iters', max_iters)
    MessageHub.get_current_instance().update_info('iter', 0)
    model = MODELS.build(config)
    model.init_weights()
    return model


def two_views(n1=6, n2=3, grids=((3, 5), (4, 4)), elements=None, seed=0, dtype=torch.float32):
    """What the preprocessor hands to an algorithm: random b1 and b2, on two grids of tokens."""
    rng = torch.Generator().manual_seed(seed)
    if elements is None:
        elements = torch.randint(8, (2, n2), generator=rng)
    return [
        ViewBatch(
            torch.randn(n1, 3, IMAGE, IMAGE, generator=rng, dtype=dtype),
            torch.randn(n2, 3, h * PATCH, w * PATCH, generator=rng, dtype=dtype),
            element,
        )
        for (h, w), element in zip(grids, elements, strict=True)
    ]
