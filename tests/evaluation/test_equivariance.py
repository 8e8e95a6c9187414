"""Scores of token maps that are known, and the hook in a run."""

import json

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmpretrain.registry import MODELS

from ser_mm.evaluation import EquivarianceHook, token_maps_of
from ser_mm.evaluation.equivariance import (
    TRANSFORMATIONS,
    equivariance_by_layer,
    equivariance_score,
)
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE, IMAGE, RESNET
from tests.support.two_ranks import on_two_ranks

TURNS = ('rot90', 'rot180', 'flip_lr', 'flip_ud')


def photos(count=12, side=64):
    """In float64: scores are sums of some 10^5 squares, rounded by 1e-16 each."""
    picture = torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1).double() / 255
    crops = picture.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).transpose(0, 1)
    return crops[:: len(crops) // count][:count].contiguous()


def unmoved_by_turns(images):
    """Maps with strides 8 and 16 of statistics that turning a patch does not change."""
    return [
        torch.cat([F.avg_pool2d(images, s), F.max_pool2d(images, s), F.max_pool2d(-images, s)], 1)
        for s in (8, 16)
    ]


def test_equivariant_map_scores_1():
    batches = photos().split(5)
    scores = equivariance_by_layer(unmoved_by_turns, batches)
    assert tuple(scores) == TRANSFORMATIONS
    for name in TURNS:
        fine, coarse = scores[name]
        assert fine['r2'] == pytest.approx(1, abs=1e-12)
        assert coarse['r2'] == pytest.approx(1, abs=1e-12)
        assert fine['retrieval'] == coarse['retrieval'] == 1
        assert (fine['chance'], coarse['chance']) == (1 / 64, 1 / 16)
    for name in ('scale', 'mixture'):  # which resizing keeps only in part
        assert 0.5 < scores[name][0]['r2'] < 1 and scores[name][0]['retrieval'] > 0.1
    assert scores['scale'][1]['chance'] == 1 / 25  # of 4 x 4 tokens, 5 x 5


def test_a_small_map_is_scaled_too():
    """Of 3 x 3 tokens, 1.3 times the area was as many, and R2 was 1 by that."""

    def patches(images):
        return [F.avg_pool2d(images, 21)]

    (score,) = equivariance_by_layer(patches, [photos()[..., :63, :63]], ['scale'])['scale']
    assert score['chance'] == 1 / 16 and score['r2'] < 1


def test_a_map_that_does_not_turn_scores_less():
    def with_places(images):
        place = torch.linspace(0, 3, 8, dtype=images.dtype).expand(len(images), 1, 8, 8)
        return [torch.cat([unmoved_by_turns(images)[0], place], dim=1)]

    scores = equivariance_by_layer(with_places, [photos()], ['rot180', 'flip_ud'])
    assert scores['rot180'][0]['r2'] < 0 and scores['rot180'][0]['retrieval'] < 0.3
    assert scores['flip_ud'][0]['r2'] == pytest.approx(1, abs=1e-12)  # places are columns


def test_noise_is_found_by_chance():
    """One hit per image is expected, and the variance of their number is below the binomial one.

    Given the keys of an image, the queries are independent, and each falls into the cell of key i
    with probability p_i: hits have mean sum p_i = 1 and variance sum p_i (1 - p_i) <= 1 - 1 / T.
    """
    rng = torch.Generator().manual_seed(0)

    def noise(images):
        return [torch.randn(len(images), 16, 8, 8, generator=rng)]

    images, tokens = 300, 64
    scores = equivariance_by_layer(noise, torch.zeros(images, 3, 64, 64).split(100), TURNS)
    five_deviations = 5 * (images * (1 - 1 / tokens)) ** 0.5
    for (score,) in scores.values():
        assert abs(score['retrieval'] * images * tokens - images) < five_deviations
        # Twice the variance is missed; of 300000 values, to 10 deviations
        assert score['r2'] == pytest.approx(-1, abs=0.05)


def test_scale_and_shift_of_the_features_do_not_count():
    def changed(images):
        return [1000 * x for x in unmoved_by_turns(images)]

    def shifted(images):
        return [x + 7 for x in unmoved_by_turns(images)]

    batches = [photos()]
    scores, scaled, moved = (
        equivariance_by_layer(maps, batches, ['scale', 'mixture'])
        for maps in (unmoved_by_turns, changed, shifted)
    )
    for name, layers in scores.items():
        for i, layer in enumerate(layers):
            assert scaled[name][i] == pytest.approx(layer, abs=1e-9)
            assert moved[name][i]['r2'] == pytest.approx(layer['r2'], abs=1e-9)


@pytest.mark.parametrize('config', [BACKBONE, dict(RESNET, depth=18)], ids=['vit', 'resnet'])
def test_every_layer_of_a_network_at_once(config):
    """The same as one layer at a time, and the network is left as it was."""
    torch.manual_seed(0)
    network = MODELS.build(config)
    network.init_weights()
    network.double().train()
    network.layers[0].eval() if config is BACKBONE else network.layer1.eval()
    modes = [module.training for module in network.modules()]
    outputs = network.out_indices
    images = F.interpolate(photos(6), 2 * IMAGE)
    with token_maps_of(network) as token_maps:
        shapes = [tuple(x.shape[1:]) for x in token_maps(images)]
        scores = equivariance_by_layer(token_maps, images.split(4), ['rot90', 'scale'])
        for i in range(4):
            for name, options in dict(rot90=dict(elements=1), scale=dict(grid=None)).items():
                if name == 'scale':
                    coarsest = min(shape[1] for shape in shapes)
                    moved = max(coarsest + 1, round(coarsest * 1.3**0.5))
                    grid = moved * shapes[i][1] // coarsest
                    options['grid'] = (grid, grid)
                one = equivariance_score(lambda x, i=i: token_maps(x)[i], images, **options)
                assert scores[name][i]['r2'] == pytest.approx(one, abs=1e-9)
    assert len(scores['rot90']) == 4
    assert network.out_indices == outputs
    assert [module.training for module in network.modules()] == modes
    if config is BACKBONE:
        assert network.out_type == 'cls_token' and set(shapes) == {(48, 8, 8)}
    else:
        assert [shape[1] for shape in shapes] == [16, 8, 4, 2]


def test_other_networks_give_the_maps_that_their_config_says():
    network = MODELS.build(dict(type='mmpretrain.MobileNetV2', out_indices=(2, 4)))
    with token_maps_of(network) as token_maps:
        scores = equivariance_by_layer(token_maps, [photos(2).float()], ['flip_lr'])
    assert [layer['chance'] for layer in scores['flip_lr']] == [1 / 64, 1 / 16]


def test_bad_input_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"transformations=\['shear'\]: choose one or more of rot90"
    ):
        equivariance_by_layer(unmoved_by_turns, [photos()], ['shear'])
    with pytest.raises(ValueError, match='no image'):
        equivariance_by_layer(unmoved_by_turns, [])
    with pytest.raises(ValueError, match=r'gives \(12, 3\), not a token map'):
        equivariance_by_layer(lambda x: [x.mean(dim=(2, 3))], [photos()])
    with pytest.raises(ValueError, match='not finite; the training of this checkpoint has div'):
        equivariance_by_layer(lambda x: [x * float('nan')], [photos()])


def test_hook_refuses_what_it_could_not_score(imagenet_tree, tmp_path):
    with pytest.raises(ValueError, match=r"transformations=\['rotate90'\]: choose one or more of"):
        EquivarianceHook(transformations=['rotate90'])
    cfg = Config(dict(model=ALGORITHMS['mocov3'], evaluation=evaluation(imagenet_tree)))
    cfg.evaluation.val.pipeline[1].crop_size = (32, 48)
    hook = dict(type='EquivarianceHook', num_images=2, interval=100)  # never after an epoch
    views = short_run.equivariant_views(equi_ratio=0.5)
    with pytest.raises(ValueError, match='48 x 32 cannot be turned'):
        short_run.run(cfg.model, views, imagenet_tree, tmp_path, hooks=[hook], cfg=cfg)


def evaluation(root):
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='CenterCrop', crop_size=64),
        dict(type='PackInputs'),
    ]
    return dict(
        val=dict(type='CustomDataset', data_root=str(root), data_prefix='train', pipeline=pipeline)
    )


def test_hook_logs_and_leaves_the_run_as_it_is(imagenet_tree, tmp_path):
    model = ALGORITHMS['mocov3']
    views = short_run.equivariant_views(equi_ratio=0.5)
    cfg = Config(dict(model=model, evaluation=evaluation(imagenet_tree)))
    hook = dict(type='EquivarianceHook', num_images=8, transformations=['rot90', 'mixture'])
    _, plain = short_run.run(model, views, imagenet_tree, tmp_path / 'plain')
    _, watched = short_run.run(
        model, views, imagenet_tree, tmp_path / 'watched', hooks=[hook], cfg=cfg
    )
    for state, other in zip(plain, watched, strict=True):
        assert [k for k in state if not torch.equal(state[k], other[k])] == []

    (file,) = (tmp_path / 'watched').glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in file.read_text().splitlines()]
    logged = [r for r in records if 'equivariance/rot90/r2_1' in r]
    assert [r['step'] for r in logged] == [4, 8]
    assert len([key for key in logged[0] if key.startswith('equivariance/')]) == 2 * 2 * 4
    assert logged[0] != logged[1]


def _watch(rank, root, folder):
    data = dict(data_root=f'{folder}/photos', crop_size=64)  # whose files the first rank writes
    counts = dict(train_per_picture=1, val_per_picture=1)
    cfg = Config(dict(model=ALGORITHMS['mocov3'], evaluation=evaluation(root)))
    cfg.evaluation.val = dict(
        type='BundledPhotos', split='val', pipeline=cfg.evaluation.val.pipeline, **data, **counts
    )
    hook = dict(type='EquivarianceHook', num_images=8, transformations=['rot90'])
    views = short_run.equivariant_views(equi_ratio=0.5)
    return short_run.run(cfg.model, views, root, f'{folder}/run', 1, hooks=[hook], cfg=cfg)[1]


@pytest.mark.slow
def test_hook_of_two_ranks_logs_once(imagenet_tree, tmp_path):
    states = on_two_ranks(_watch, str(imagenet_tree), str(tmp_path))
    assert [len(own) for own in states] == [3, 3]
    (file,) = tmp_path.glob('run/*/vis_data/scalars.json')
    logged = [line for line in file.read_text().splitlines() if 'equivariance/rot90/r2_1' in line]
    assert len(logged) == 1
