"""Mistakes in a config are one clear ValueError, with the field and its value."""

import copy

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import init_default_scope
from mmpretrain.registry import TRANSFORMS
from torch import nn
from torch.utils.data import DataLoader

from ser_mm.datasets import split_batches
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE, EMBED_DIMS, MODELS, PATCH, with_ser


def changed(**options):
    """The MoCo v3 config with options such as ``algorithm__backbone=...`` replaced."""
    config = copy.deepcopy(ALGORITHMS['mocov3'])
    for path, value in options.items():
        *folders, name = path.split('__')
        place = config
        for folder in folders:
            place = place[folder]
        place[name] = value
    return config


def refused(config, message, build=MODELS.build):
    with pytest.raises(ValueError, match=message) as info:
        build(copy.deepcopy(config))
    assert '\n' not in str(info.value)


@pytest.mark.parametrize('ser_layer', [0, 5, -1])
def test_ser_layer_outside_the_network(ser_layer):
    refused(dict(BACKBONE, ser_layer=ser_layer), f'ser_layer={ser_layer} .* from 1 to 4')
    refused(changed(algorithm__backbone__ser_layer=ser_layer), f'ser_layer={ser_layer}')


@pytest.mark.parametrize('cls_layer', [-1, 4, 5])
def test_cls_layer_outside_the_network(cls_layer):
    refused(dict(BACKBONE, cls_layer=cls_layer), f'cls_layer={cls_layer} .* to 3')


def test_cls_layer_of_the_last_ser_layer_has_to_be_named():
    refused(dict(BACKBONE, ser_layer=4), 'cls_layer=4')
    assert MODELS.build(dict(BACKBONE, ser_layer=4, cls_layer=3)).cls_layer == 3


def test_late_cls_without_cls_or_before_it_is_there():
    options = dict(with_cls_token=False, out_type='avg_featmap')
    refused(dict(BACKBONE, **options, cls_layer=2), 'cls_layer=2 needs with_cls_token=True')
    assert MODELS.build(dict(BACKBONE, **options)).cls_layer == 0
    refused(dict(BACKBONE, out_indices=[1, 3]), r'out_indices=\[1, 3\]')
    assert MODELS.build(dict(BACKBONE, out_indices=[1, 3], out_type='raw')).cls_layer == 2


def test_positions_that_cannot_be_smoothed():
    options = dict(pos_resize='timm', interpolate_mode='nearest')
    refused(dict(BACKBONE, **options), "pos_resize='timm' .*interpolate_mode='nearest'")


@pytest.mark.parametrize('img_size', [30, (32, 36)])
def test_image_size_that_is_no_multiple_of_the_patch(img_size):
    refused(dict(BACKBONE, img_size=img_size), r'img_size=\(3[02], 3[06]\) .*patch_size=\(8, 8\)')


def test_channels_that_do_not_match_the_backbone():
    refused(changed(neck__in_channels=50), 'neck.in_channels=50, .* set neck.in_channels=48')


def test_patch_size_that_does_not_match_the_backbone():
    refused(changed(data_preprocessor__patch_size=16), 'patch_size=16.* patch_size=8')


@pytest.mark.parametrize('name', ['scale', 'aspect_ratio'])
@pytest.mark.parametrize(
    'bounds', [(1.3, 0.7), (0, 1), (-1, 1), (1, float('inf')), (float('nan'), 1), (1,)]
)
def test_ranges_of_scale_and_aspect_ratio(name, bounds):
    config = dict(type='SERDataPreprocessor', **{name: bounds})
    refused(config, name + '=' + str(bounds).replace('(', r'\(').replace(')', r'\)'))


@pytest.mark.parametrize('patch_size', [0, -8])
def test_patch_size_that_is_not_positive(patch_size):
    config = dict(type='SERDataPreprocessor', patch_size=patch_size)
    refused(config, f'patch_size={patch_size}')


@pytest.mark.parametrize('equi_ratio', [-0.1, 1.5, float('nan')])
def test_equi_ratio_outside_its_range(equi_ratio):
    init_default_scope('mmpretrain')
    config = short_run.equivariant_views(equi_ratio)
    refused(config, f'equi_ratio={equi_ratio} ', TRANSFORMS.build)


@pytest.mark.parametrize('name, value', [('equi_views', [[]]), ('equi_views', []), ('views', [[]])])
def test_number_of_views(name, value):
    init_default_scope('mmpretrain')
    config = {**short_run.equivariant_views(0.5), name: value}
    refused(config, f'{len(value)} {name}', TRANSFORMS.build)


def test_crop_that_is_not_square():
    init_default_scope('mmpretrain')
    config = dict(short_run.equivariant_views(1), equi_crop=[])
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match='equi_crop gave an image of 20 x 30'):
        TRANSFORMS.build(config)(dict(img=image))


class WithoutBackbone(nn.Module):
    def loss(self, inputs, data_samples):
        return dict(loss=inputs[0].mean())


def test_algorithm_without_a_backbone():
    refused(with_ser(dict(type=WithoutBackbone)), 'algorithm=WithoutBackbone has no `backbone`')


@pytest.mark.parametrize(
    'backbone',
    [
        {**BACKBONE, 'ser_layer': None},
        {**{k: v for k, v in BACKBONE.items() if k != 'ser_layer'}, 'type': 'VisionTransformer'},
        dict(type='ResNet', depth=18),
    ],
)
def test_backbone_without_token_map(backbone):
    refused(changed(algorithm__backbone=backbone), f'{backbone["type"]}, gives no token map')


@pytest.mark.parametrize('out_type', ['raw', 'featmap'])
def test_backbone_whose_outputs_cannot_hold_both_parts(out_type):
    refused(changed(algorithm__backbone__out_type=out_type), f"out_type='{out_type}'")


def batch(views, size=40, collate=default_collate):
    init_default_scope('mmpretrain')
    pipeline = [TRANSFORMS.build(t) for t in (views, dict(type='PackInputs'))]
    rng = np.random.default_rng(0)
    data = [dict(img=rng.integers(256, size=(size, size, 3), dtype=np.uint8)) for _ in range(3)]
    for transform in pipeline:
        if hasattr(transform, 'in_b2'):
            transform.in_b2 = True  # as ExactSplit assigns images
        data = [transform(x) for x in data]
    return collate(data)


def test_pipeline_without_geometry_records():
    preprocessor = MODELS.build(ALGORITHMS['mocov3']['data_preprocessor'])
    lost = batch(short_run.MULTI_VIEW)
    with pytest.raises(ValueError, match='geometry records.*EquivariantViewPipeline'):
        preprocessor(lost, training=True)
    kept = batch(short_run.equivariant_views(0.5))
    assert len(preprocessor(kept, training=True)['inputs']) == 2
    kept['inputs'] = kept['inputs'][:-1]  # a transform of one's own drops the record
    with pytest.raises(ValueError, match='geometry records'):
        preprocessor(kept, training=True)


def test_batch_that_is_not_stacked():
    preprocessor = MODELS.build(ALGORITHMS['mocov3']['data_preprocessor'])
    for size in (40, 48):
        loose = batch(short_run.equivariant_views(0.5), size, pseudo_collate)
        with pytest.raises(ValueError, match="collate_fn=dict.type='default_collate'"):
            preprocessor(loose, training=True)


@pytest.mark.parametrize('odd', [0, 1])
def test_images_that_are_not_whole_patches(odd):
    crops = [dict(type='RandomResizedCrop', scale=36 if v == odd else 32) for v in range(2)]
    views = dict(
        short_run.equivariant_views(0), views=[[crop] for crop in crops], equi_views=[[], []]
    )
    preprocessor = MODELS.build(ALGORITHMS['mocov3']['data_preprocessor'])
    with pytest.raises(ValueError, match=f'36 x 36 .*patch_size={PATCH}'):
        preprocessor(collated(TRANSFORMS.build(views)), training=True)


def collated(pipeline):
    pack = TRANSFORMS.build(dict(type='PackInputs'))
    return default_collate([pack(pipeline(dict(img=np.zeros((40, 40, 3), np.uint8))))])


class Images:
    """A data set of grey images, of the sizes given."""

    def __init__(self, pipeline, sizes=(40,) * 8):
        self.pipeline, self.sizes = pipeline, sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        side = self.sizes[index]
        return self.pipeline(dict(img=np.zeros((side, side, 3), np.uint8)))


class Pipeline:
    def __init__(self, transform):
        self.transforms = [transform]

    def __call__(self, results):
        return self.transforms[0](results)['img']


def crop(size):
    return dict(type='CenterCrop', crop_size=size)


@pytest.mark.parametrize(
    'options, place',
    [
        (dict(views=[[crop(32)]] * 2, equi_crop=[crop(24)]), r'equi_crop with equi_views\[0\]'),
        (dict(views=[[crop(32)], [crop(24)]], equi_crop=[crop(32)]), r'equi_views\[1\]|views\[1\]'),
        (dict(views=[[crop(32)]] * 2, equi_crop=[]), r'equi_crop with equi_views\[0\]'),
        (dict(views=[[], []], equi_crop=[crop(32)]), r'equi_views\[0\]|views\[0\]'),
    ],
)
def test_views_of_a_batch_that_differ_in_size(options, place):
    init_default_scope('mmpretrain')
    views = TRANSFORMS.build(dict(short_run.equivariant_views(0.25), **options))
    loader = DataLoader(Images(Pipeline(views)), batch_size=8, collate_fn=default_collate)
    split_batches(loader)
    with pytest.raises(ValueError, match=f'{place}.* gives an image of .* x .*, others .* are'):
        next(iter(loader))


def test_views_of_other_batches_may_differ_in_size():
    init_default_scope('mmpretrain')
    views = dict(short_run.equivariant_views(0.5), views=[[], []], equi_crop=[])
    data = Images(Pipeline(TRANSFORMS.build(views)), sizes=(40,) * 4 + (32,) * 4)
    loader = DataLoader(data, batch_size=4, collate_fn=default_collate)
    split_batches(loader)
    assert [batch[0].shape[1] for batch in loader] == [40, 32]


def test_training_with_the_wrong_pipeline_stops_at_the_first_step(imagenet_tree, tmp_path):
    with pytest.raises(ValueError, match='geometry records'):
        short_run.run(ALGORITHMS['mocov3'], short_run.MULTI_VIEW, imagenet_tree, tmp_path)


def test_the_config_that_is_changed_here_is_right():
    model = MODELS.build(changed(neck__in_channels=EMBED_DIMS))
    assert isinstance(model, nn.Module) and torch.is_tensor(next(model.parameters()))
