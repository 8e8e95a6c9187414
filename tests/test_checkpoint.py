"""A checkpoint of a pretraining run fills a backbone completely, or the load is an error."""

import copy
import os
import pickle

import pytest
import torch
from mmpretrain.registry import MODELS

from ser_mm.checkpoint import read_weights
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE, EMBED_DIMS, build

# The pretrained backbone without SER: what a user of the checkpoint writes.
PLAIN = {**BACKBONE, 'ser_layer': None, 'cls_layer': 2}


@pytest.fixture(scope='module')
def checkpoint(imagenet_tree, tmp_path_factory):
    """Written by MMEngine after 4 steps, with optimizer, schedules and logged history."""
    folder = tmp_path_factory.mktemp('run')
    views = short_run.equivariant_views(equi_ratio=0.5)
    model = ALGORITHMS['mocov3']
    runner, _ = short_run.run(model, views, imagenet_tree, folder, epochs=1)
    weights = runner.model.backbone.state_dict()
    return folder / 'epoch_1.pth', copy.deepcopy(weights)


def pretrained(checkpoint, prefix='backbone.'):
    return dict(type='Pretrained', checkpoint=str(checkpoint), prefix=prefix)


def load(checkpoint, prefix='backbone.', **options):
    return build(dict(PLAIN, init_cfg=pretrained(checkpoint, prefix), **options))


def assert_filled(backbone, weights):
    state = backbone.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key


def altered(checkpoint, folder, change):
    """The checkpoint with its weights changed, saved elsewhere."""
    content = torch.load(checkpoint, weights_only=False)
    change(content['state_dict'])
    torch.save(content, folder / 'altered.pth')
    return folder / 'altered.pth'


def test_fills_a_classifier_of_mmpretrain(checkpoint):
    path, weights = checkpoint
    classifier = build(
        dict(
            type='ImageClassifier',
            backbone=dict(PLAIN, init_cfg=pretrained(path)),
            head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=EMBED_DIMS),
        )
    )
    assert_filled(classifier.backbone, weights)
    images = torch.randn(2, 3, 32, 32)
    assert classifier(images, mode='tensor').shape == (2, 3)


def test_fills_a_detector_of_mmdetection(checkpoint):
    registry = pytest.importorskip('mmdet.registry').MODELS
    import mmdet.models  # noqa: F401  registers the modules

    path, weights = checkpoint
    backbone = dict(PLAIN, type='mmpretrain.SERVisionTransformer', out_type='featmap')
    anchors = dict(
        type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[BACKBONE['patch_size']]
    )
    head = dict(type='RetinaHead', num_classes=3, in_channels=EMBED_DIMS, anchor_generator=anchors)
    config = dict(
        type='RetinaNet',
        backbone=dict(backbone, init_cfg=pretrained(path)),
        neck=None,
        bbox_head=head,
    )
    detector = registry.build({**config, '_scope_': 'mmdet'})
    detector.init_weights()
    assert_filled(detector.backbone, weights)
    (featmap,) = detector.extract_feat(torch.randn(1, 3, 48, 64))
    assert featmap.shape == (1, EMBED_DIMS, 6, 8)

    wrong = registry.build(
        {
            **config,
            'backbone': dict(backbone, init_cfg=pretrained(path, 'bone.')),
            '_scope_': 'mmdet',
        }
    )
    with pytest.raises(ValueError, match="prefix='bone.'"):
        wrong.init_weights()


def test_fills_another_image_size_with_resized_positions(checkpoint):
    path, weights = checkpoint
    backbone = load(path, img_size=48)
    assert backbone.pos_embed.shape == (1, 36, EMBED_DIMS)
    assert_filled(backbone, dict(weights, pos_embed=backbone.pos_embed))
    assert not torch.equal(backbone.pos_embed[:, :16], weights['pos_embed'])


def test_fills_from_the_weights_alone_and_from_safetensors(checkpoint, tmp_path):
    _, weights = checkpoint
    torch.save(weights, tmp_path / 'weights.pth')
    assert_filled(load(tmp_path / 'weights.pth', prefix=None), weights)
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file({f'backbone.{k}': v for k, v in weights.items()}, tmp_path / 'w.safetensors')
    assert_filled(load(tmp_path / 'w.safetensors'), weights)


@pytest.mark.parametrize('prefix', ['backbones.', 'momentum.', None])
def test_wrong_prefix(checkpoint, prefix):
    with pytest.raises(ValueError, match=f"prefix='{prefix or ''}'"):
        load(checkpoint[0], prefix)


ALTERATIONS = {
    'missing key': (
        lambda weights: weights.pop('backbone.layers.1.ln1.weight'),
        'Missing key.*layers.1.ln1.weight',
    ),
    'missing positions': (lambda weights: weights.pop('backbone.pos_embed'), 'pos_embed'),
    'unused key': (
        lambda weights: weights.update({'backbone.extra.weight': torch.ones(1)}),
        'Unexpected key.*extra.weight',
    ),
    'wrong shape': (
        lambda weights: weights.update({'backbone.ln1.weight': torch.ones(7)}),
        'size mismatch for ln1.weight',
    ),
    'an ordinary ViT': (
        lambda weights: weights.pop('backbone.cls_after'),
        r'\[CLS\] after block 0.*cls_layer=0',
    ),
    'another [CLS]': (
        lambda weights: weights['backbone.cls_after'].fill_(3),
        r'\[CLS\] after block 3.*cls_layer=3',
    ),
}


@pytest.mark.parametrize('name', ALTERATIONS)
def test_weights_that_do_not_fit(checkpoint, tmp_path, name):
    change, message = ALTERATIONS[name]
    path = altered(checkpoint[0], tmp_path, change)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        load(path)


@pytest.mark.parametrize('cls_layer', [0, 1, 3])
def test_network_that_inserts_cls_elsewhere(checkpoint, cls_layer):
    with pytest.raises(ValueError, match=f'after block {cls_layer}; set cls_layer=2'):
        load(checkpoint[0], cls_layer=cls_layer)


def test_network_of_another_depth_or_kind(checkpoint):
    path, _ = checkpoint
    with pytest.raises(ValueError, match='(?s)Unexpected key.*layers.3'):
        load(path, arch=dict(BACKBONE['arch'], num_layers=3))
    with pytest.raises(ValueError, match='(?s)Missing key.*ln2'):
        load(path, out_type='avg_featmap')


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('place', ['beside', 'inside'])
def test_code_in_a_checkpoint_is_refused_and_not_run(checkpoint, tmp_path, place):
    content = torch.load(checkpoint[0], weights_only=False)
    harm = Harm(tmp_path / 'harm')
    (content if place == 'beside' else content['state_dict'])['backbone.extra'] = harm
    torch.save(content, tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError, match='mkdir'):
        load(tmp_path / 'bad.pth')
    assert not harm.path.exists()
    torch.load(tmp_path / 'bad.pth', weights_only=False)
    assert harm.path.exists()  # it would have run


def test_getattr_in_a_checkpoint_reaches_nothing(tmp_path):
    """MMEngine's history needs ``getattr``; pickle could walk from it to anything."""

    class Walk:
        def __reduce__(self):
            return getattr, (torch.Tensor, '__init__')

    torch.save(dict(state_dict=dict(a=Walk())), tmp_path / 'bad.pth')
    with pytest.raises(pickle.UnpicklingError):
        read_weights(str(tmp_path / 'bad.pth'))


@pytest.mark.parametrize('content', [b'x', bytes(1000), b'<html>not found</html>'])
def test_what_is_not_of_torch_is_damage_and_not_harm(tmp_path, content):
    """The advice to trust such a file would be wrong."""
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(ValueError, match='a.pth .* cannot be read as a checkpoint'):
        read_weights(str(tmp_path / 'a.pth'))


@pytest.mark.parametrize('part', [0, 0.5, 0.99])
def test_damaged_checkpoint(checkpoint, tmp_path, part):
    data = checkpoint[0].read_bytes()
    file = tmp_path / 'epoch_1.pth'
    file.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match=r'epoch_1\.pth \(\d+ bytes\) cannot be read'):
        load(file)
    torch.save(torch.ones(2), file)
    with pytest.raises(ValueError, match=r'epoch_1\.pth holds a Tensor, not weights by name'):
        load(file)


def test_checkpoint_of_mmengine_is_read_without_trust(checkpoint):
    path, weights = checkpoint
    content = torch.load(path, weights_only=False)
    assert {'optimizer', 'param_schedulers', 'message_hub', 'meta'} <= content.keys()
    assert content['message_hub']['log_scalars']  # the part that needs the allow-list
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    read = read_weights(str(path))
    assert read.keys() == content['state_dict'].keys()
    assert all(torch.equal(read[k], v) for k, v in content['state_dict'].items())
    assert {k for k in read if k.startswith('backbone.')} == {f'backbone.{k}' for k in weights}


def test_checkpoint_loads_into_the_bare_algorithm_and_back(checkpoint):
    path, _ = checkpoint
    bare = build(short_run.without_ser(ALGORITHMS['mocov3']))
    result = bare.load_state_dict(read_weights(str(path)), strict=False)
    assert result.missing_keys == []
    assert {key.split('.')[0] for key in result.unexpected_keys} == {'ser_neck'}
    model = MODELS.build(ALGORITHMS['mocov3'])
    result = model.load_state_dict(bare.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {key.split('.')[0] for key in result.missing_keys} == {'ser_neck'}
    model.load_state_dict(read_weights(str(path)), strict=True)


def test_resuming_continues_bit_by_bit(imagenet_tree, tmp_path):
    views = short_run.equivariant_views(equi_ratio=0.5)
    model = ALGORITHMS['mocov3']
    _, whole = short_run.run(model, views, imagenet_tree, tmp_path / 'whole')
    _, rest = short_run.run(
        model,
        views,
        imagenet_tree,
        tmp_path / 'rest',
        resume_from=tmp_path / 'whole' / 'epoch_1.pth',
    )
    assert len(whole) == 9 and len(rest) == 5
    for state, other in zip(rest, whole[4:], strict=True):
        assert [k for k in other if not torch.equal(state[k], other[k])] == []
