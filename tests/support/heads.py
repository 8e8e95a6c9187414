"""Tiny algorithms with the equivariance objectives that SER was compared with.

To add a head, add it to ``HEADS``, with the views that it needs.
"""

import copy

from tests.support import short_run
from tests.support.algorithms import BACKBONE, BASES, EMBED_DIMS, IMAGE, PIXELS, RESNET, mlp

HEADS = dict(
    augself=dict(type='AugSelfHead', hid_channels=16),
    equimod=dict(type='EquiModHead', hid_channels=16, out_channels=8),
    stl=dict(type='STLHead', code_channels=8, hid_channels=16, out_channels=8),
    essl=dict(type='RotationHead', hid_channels=16),
)
SMALL = IMAGE // 2
VIEWS = dict(
    augself=dict(record_draws=True),
    equimod=dict(record_draws=True, extra_views=[[dict(type='Resize', scale=(IMAGE, IMAGE))]]),
    stl=dict(pair_draws=True),
    essl=dict(extra_views=[[dict(type='RandomResizedCrop', scale=SMALL)]]),
)
FORMS = dict(
    original=dict(ser_layer=None),
    decoupled=dict(ser_layer=2, cls_layer=0),
    late_cls=dict(ser_layer=2),
    resnet=dict(ser_layer=2),
)
# Every head in both forms, and each of the other places and algorithms once.
CASES = [
    *((name, 'mocov3', form) for name in HEADS for form in ('original', 'decoupled')),
    ('augself', 'barlowtwins', 'late_cls'),
    ('equimod', 'dino', 'decoupled'),
    ('stl', 'simsiam', 'resnet'),
    ('essl', 'dino', 'late_cls'),
    ('essl', 'byol', 'resnet'),
]


def config(name, base, form, norm=None, **backbone):
    """An EquivarianceAlgorithm; ``norm`` replaces the norm of its head."""
    if form == 'resnet':
        body, neck = RESNET, mlp(192, with_avg_pool=True)
    else:
        body, neck = BACKBONE, mlp(EMBED_DIMS)
    algorithm = BASES[base]({**body, **FORMS[form], **backbone}, neck)
    head = dict(HEADS[name], **({} if norm is None else dict(norm_cfg=norm)))
    return copy.deepcopy(
        dict(
            type='EquivarianceAlgorithm',
            algorithm=algorithm,
            head=head,
            data_preprocessor=dict(type='SelfSupDataPreprocessor', **PIXELS),
        )
    )


def views(name, **options):
    """The view pipeline that a head needs, on the policy of ``short_run``."""
    return dict(
        type='EquivariantViewPipeline',
        views=short_run.VIEWS,
        equi_ratio=0,
        **VIEWS[name],
        **options,
    )
