"""The policy of b2 that EquivariantViewPipeline derives from that of b1, and what it refuses."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import TRANSFORMS

from tests.support.paths import ROOT

CROP = dict(type='RandomResizedCrop', scale=16)
JITTER = dict(type='ColorJitter', brightness=0.4)
SOLARIZE = dict(type='Solarize', thr=128, prob=0.2)
FLIP = dict(type='RandomFlip', prob=0.5)
TYPE = 'EquivariantViewPipeline'


def build(**options):
    init_default_scope('mmpretrain')
    return TRANSFORMS.build(dict(type=TYPE, **deepcopy(options)))


def policy(transform):
    return repr((transform.views, transform.equi_crop, transform.equi_views))


# Those of images of one size make their views on the device.
CONFIGS = sorted(
    p
    for p in (ROOT / 'configs').rglob('ser_*.py')
    if p.parent.name not in ('coco', 'small_images', 'tiny_imagenet')
)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_derive_the_policy_that_they_used_to_spell_out(path):
    """The crop, and the photometry of each view, are variables of the configs."""
    cfg = Config.fromfile(path)
    pipeline = cfg.train_dataloader.dataset.pipeline[1].to_dict()
    assert pipeline.pop('type') == TYPE and not {'equi_crop', 'equi_views'} & pipeline.keys()
    on_device = cfg.model.get('data_preprocessor', {}).get('photometry')
    photometry = [[], []] if on_device else [cfg.photometry1, cfg.photometry2]
    views = [[cfg.crop, *transforms, cfg.flip] for transforms in photometry]
    if path.stem.endswith('multicrop'):
        views += 4 * [cfg.get('local_crop') or cfg.small_crop]
    explicit = build(
        views=views, equi_crop=[cfg.crop], equi_views=photometry, equi_ratio=pipeline['equi_ratio']
    )
    assert policy(build(**pipeline)) == policy(explicit)


def test_policies_of_mmpretrain_can_be_sorted():
    """Whatever MMPretrain's own two-view configs do to an image, but for their own crops."""
    base = 'mmpretrain::mocov3/mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k.py'
    cfg = Config.fromstring(f'_base_ = [{base!r}]', '.py')
    transform = build(views=[cfg.view_pipeline1, cfg.view_pipeline2])
    names = [[type(x).__name__ for x in view.transforms] for view in transform.equi_views]
    for found, (crop, *photometry, flip) in zip(
        names, (cfg.view_pipeline1, cfg.view_pipeline2), strict=True
    ):
        assert (crop.type, flip.type) == ('RandomResizedCrop', 'RandomFlip')
        assert found == [transform.type for transform in photometry]
    assert [type(x).__name__ for x in transform.equi_crop.transforms] == ['RandomResizedCrop']


def test_explicit_parts_win():
    own = dict(CROP, scale=8)
    transform = build(views=[[CROP, JITTER, FLIP]] * 2, equi_crop=[own])
    assert transform.equi_crop.transforms[0].scale == (8, 8)
    assert [len(view.transforms) for view in transform.equi_views] == [1, 1]
    transform = build(views=[[CROP, JITTER, FLIP]] * 2, equi_views=[[], [SOLARIZE]])
    assert [len(view.transforms) for view in transform.equi_views] == [0, 1]
    # What cannot be derived need not be, where it is given.
    build(views=[[CROP], [own]], equi_crop=[CROP])
    build(views=[[CROP, dict(type='Rotate', angle=30.0)], [CROP]], equi_views=[[], []])


def test_arguments_of_multi_view():
    views = [[CROP, JITTER, FLIP], [CROP, SOLARIZE, FLIP]]
    expected = policy(build(views=views))
    assert policy(build(transforms=views, num_views=[1, 1])) == expected
    twice = policy(build(views=[views[0]] * 2))
    assert policy(build(transforms=views[:1], num_views=2)) == twice
    assert policy(build(transforms=views[:1], num_views=[2])) == twice
    local = [dict(CROP, scale=8)]
    assert len(build(transforms=[*views, local], num_views=[1, 1, 4]).views) == 6


def test_built_transforms_are_sorted_as_their_configs():
    views = [[CROP, dict(type='RandomApply', transforms=[JITTER], prob=0.8), FLIP]] * 2
    init_default_scope('mmpretrain')
    built = [[TRANSFORMS.build(x) for x in view] for view in deepcopy(views)]
    transform = TRANSFORMS.build(dict(type=TYPE, views=built, equi_ratio=1))
    assert repr(transform.equi_views) == repr(build(views=views).equi_views)
    image = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    *images, record = transform(dict(img=image))['img']
    assert [x.shape for x in images] == [(16, 16, 3)] * 2 and isinstance(record, torch.Tensor)


def nested(*transforms):
    return dict(type='RandomApply', transforms=list(transforms), prob=0.5)


NOT_SORTED = {
    'rotation': dict(type='Rotate', angle=30.0),
    'erasing': dict(type='RandomErasing'),
    'second crop': dict(type='CenterCrop', crop_size=8),
    'geometry around photometry': nested(JITTER, dict(type='Shear', magnitude=0.1)),
    'crop in a choice': dict(type='RandomChoice', transforms=[[JITTER], [CROP]]),
}


@pytest.mark.parametrize('name', NOT_SORTED)
def test_what_cannot_be_sorted_is_refused_by_name(name):
    odd = NOT_SORTED[name]
    with pytest.raises(ValueError) as error:
        build(views=[[CROP, JITTER, FLIP], [CROP, JITTER, odd, FLIP]])
    message = str(error.value)
    assert f'{odd["type"]}' in message and 'views[1]' in message
    assert 'give equi_crop and equi_views' in message and '\n' not in message


def test_different_crops_are_refused():
    for other in ([dict(CROP, scale=8)], []):
        with pytest.raises(ValueError, match='differ in the crops .*give equi_crop'):
            build(views=[[CROP, JITTER], [*other, JITTER]])


GEOMETRY = {
    'flip': FLIP,
    'nested flip': nested(JITTER, FLIP),
    'crop': CROP,
    'rotation': dict(type='Rotate', angle=30.0),
    'choice': dict(type='RandomChoice', transforms=[[JITTER], [FLIP]]),
    'automatic policy': dict(type='AutoAugment', policies='imagenet'),
    'random policy': dict(
        type='RandAugment', policies='timm_increasing', num_policies=2, magnitude_level=9
    ),
    'of torchvision': dict(type='torchvision/RandomHorizontalFlip'),
    'of other keys': dict(type='KeyMapper', mapping=dict(img='img'), transforms=[FLIP]),
}


@pytest.mark.parametrize('name', GEOMETRY)
def test_geometry_among_the_photometry_of_b2_is_refused(name):
    """It was accepted, and made records false: the images moved, the elements said otherwise."""
    with pytest.raises(ValueError, match='in equi_views moves the content') as error:
        build(views=[[CROP], [CROP]], equi_crop=[CROP], equi_views=[[JITTER], [GEOMETRY[name]]])
    moving = dict.fromkeys(('nested flip', 'choice', 'of other keys'), 'RandomFlip')
    assert moving.get(name, GEOMETRY[name]['type']) in str(error.value)


def test_photometry_of_torchvision_works_where_it_is_given():
    jitter = dict(type='torchvision/ColorJitter', brightness=0.4)
    build(views=[[CROP, jitter]] * 2, equi_crop=[CROP], equi_views=[[jitter], []])
    with pytest.raises(ValueError, match=r'torchvision/ColorJitter in views\[0\]'):
        build(views=[[CROP, jitter]] * 2)


@pytest.mark.parametrize(
    'options, message',
    [
        ({}, 'give either views'),
        (dict(views=[[CROP]] * 2, transforms=[[CROP]] * 2), 'give either views'),
        (dict(transforms=[[CROP]], num_views=[1, 1]), r'num_views=\[1, 1\] has 2 numbers for 1'),
        (dict(transforms=[[CROP]], num_views=1), '2 equi_views and 1 views'),
    ],
)
def test_views_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
