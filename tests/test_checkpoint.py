"""A checkpoint of a pretraining run fills a backbone completely, or the load is an error."""

import argparse
import copy
import os
import pickle
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from mmpretrain.registry import MODELS
from torch import nn
from torchvision.models import resnet18

from ser_mm.checkpoint import load_backbone, read_checkpoint, read_weights
from ser_mm.evaluation import build_backbone
from tests.support import short_run
from tests.support.algorithms import ALGORITHMS, BACKBONE, EMBED_DIMS, build
from tests.support.foreign import FOREIGN, modules, trained

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


@pytest.mark.parametrize('prefix', ['backbones.', 'momentum.', ''])
def test_wrong_prefix(checkpoint, prefix):
    with pytest.raises(ValueError, match=f"prefix='{prefix}'"):
        load(checkpoint[0], prefix)


@pytest.mark.parametrize('prefix', [None, 'backbone'])
def test_prefix_that_is_found_or_lacks_its_dot(checkpoint, prefix):
    assert_filled(load(checkpoint[0], prefix), checkpoint[1])


def test_a_moving_average_does_not_stand_in_for_a_damaged_backbone(checkpoint, tmp_path):
    path = altered(checkpoint[0], tmp_path, lambda x: x.pop('backbone.layers.1.ln1.weight'))
    with pytest.raises(ValueError, match=r"(?s)prefix='backbone\.'.*layers.1.ln1.weight"):
        load(path, None)
    load(path, 'momentum_encoder.module.0.')  # which is whole


@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
@pytest.mark.parametrize('beside', [[], [dict(type='Normal', layer='Linear', std=9.0)]])
def test_init_cfg_in_a_list_is_strict_too(checkpoint, kind, beside):
    cfg = dict(pretrained(checkpoint[0]), type=kind)
    assert_filled(build(dict(PLAIN, init_cfg=[*beside, cfg])), checkpoint[1])
    with pytest.raises(ValueError, match="prefix='bone.'"):
        build(dict(PLAIN, init_cfg=[*beside, dict(cfg, prefix='bone.')]))


def test_init_cfg_without_a_file():
    with pytest.raises(ValueError, match='init_cfg has checkpoint=None; name a file or URL'):
        build(dict(PLAIN, init_cfg=dict(type='Pretrained')))


def test_loaded_weights_are_logged_as_loaded(checkpoint, imagenet_tree, tmp_path):
    path, weights = checkpoint
    model = copy.deepcopy(ALGORITHMS['mocov3'])
    model['algorithm']['backbone']['init_cfg'] = pretrained(path)
    views = short_run.equivariant_views(equi_ratio=0.5)
    short_run.run(model, views, imagenet_tree, tmp_path / 'run', epochs=1, log_level='INFO')
    (log,) = (tmp_path / 'run').rglob('*.log')
    told = re.findall(r'^algorithm\.(backbone\.\S+) - .*\n(.*)', log.read_text(), re.M)
    assert {name for name, _ in told} == {
        f'backbone.{name}' for name, _ in build(PLAIN).named_parameters()
    }
    assert {how.strip() for _, how in told} == {f'Loaded from {path}'}
    loaded = f"SERVisionTransformer: loaded {len(weights)} tensors of {path} (prefix='backbone.')."
    assert loaded in log.read_text()


ALTERATIONS = {
    'missing key': (
        lambda weights: weights.pop('backbone.layers.1.ln1.weight'),
        'Missing in the file: .*layers.1.ln1.weight',
    ),
    'missing positions': (lambda weights: weights.pop('backbone.pos_embed'), 'pos_embed'),
    'unused key': (
        lambda weights: weights.update({'backbone.extra.weight': torch.ones(1)}),
        'Not in the network: extra.weight',
    ),
    'wrong shape': (
        lambda weights: weights.update({'backbone.ln1.weight': torch.ones(7)}),
        r'Of other shapes: ln1.weight \(7 in the file, 48 in the network\)',
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
    with pytest.raises(ValueError, match='Not in the network: .*layers.3'):
        load(path, arch=dict(BACKBONE['arch'], num_layers=3))
    with pytest.raises(ValueError, match='Missing in the file: .*ln2'):
        load(path, out_type='avg_featmap')


def test_another_network_is_one_sentence(checkpoint, tmp_path):
    """torch lists hundreds of names, each shape on a line of its own."""
    path, _ = checkpoint
    with pytest.raises(ValueError, match=r' and \d+ more') as error:
        load(path, arch=dict(BACKBONE['arch'], embed_dims=96))
    told = str(error.value)
    assert 'Of other shapes: cls_token (1, 1, 48 in the file, 1, 1, 96 in the network), ' in told
    assert '\n' not in told and len(told) < 500


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pth does not exist; name a checkpoint'):
        read_weights(str(tmp_path / 'none.pth'))
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (tmp_path / name).touch()
    with pytest.raises(IsADirectoryError, match='is a folder; .* such as epoch_2.pth'):
        read_weights(str(tmp_path))
    with pytest.raises(FileNotFoundError, match='no storage is known by file://; give a path'):
        read_weights(f'file://{tmp_path / "epoch_1.pth"}')


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
    with pytest.raises(ValueError, match='a.pth .* cannot be read as a checkpoint') as error:
        read_weights(str(tmp_path / 'a.pth'))
    assert 'weights_only' not in str(error.value) and '\n' not in str(error.value)


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


ViT = pytest.importorskip('timm.models.vision_transformer').VisionTransformer
ARCH = BACKBONE['arch']
OURS = dict(type='SERVisionTransformer', arch=ARCH, img_size=32, patch_size=8)


def timm_vit(**options):
    """A ViT of timm, with weights that are no constants."""
    torch.manual_seed(1)
    vit = ViT(
        **dict(dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3), **options),
        mlp_ratio=ARCH['feedforward_channels'] / ARCH['embed_dims'],
        num_classes=5,
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return vit


@pytest.mark.parametrize('name', FOREIGN)
def test_foreign_checkpoint(name, tmp_path):
    vit = timm_vit()
    torch.save(FOREIGN[name](vit), tmp_path / 'foreign.pth')
    with torch.no_grad():
        assert_same_features(vit, build_backbone(config(OURS), str(tmp_path / 'foreign.pth')))


def config(backbone, **evaluation):
    return Config(
        dict(model=dict(type='ImageClassifier', backbone=backbone), evaluation=evaluation)
    )


def assert_same_features(vit, backbone, pool=lambda x: x[:, 0]):
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    features = pool(vit.double().eval().forward_features(images))
    assert features.std() > 0.1
    # Four blocks in double precision, whose rounding is 1e-16.
    torch.testing.assert_close(backbone.double()(images)[-1], features, rtol=1e-9, atol=1e-9)


KINDS_OF_VIT = {
    'LayerScale, as DINOv2': (dict(init_values=1e-5), dict(layer_scale_init_value=1e-5)),
    'norm before the blocks, as CLIP': (dict(pre_norm=True), dict(pre_norm=True)),
}


@pytest.mark.parametrize('name', KINDS_OF_VIT)
def test_foreign_kind_of_vit(name, tmp_path):
    theirs, ours = KINDS_OF_VIT[name]
    vit = timm_vit(**theirs)
    vit.mask_token = nn.Parameter(torch.ones(1, 48))
    safetensors = pytest.importorskip('safetensors.torch')
    safetensors.save_file(vit.state_dict(), tmp_path / 'vit.safetensors')
    with torch.no_grad():
        backbone = build_backbone(config({**OURS, **ours}), str(tmp_path / 'vit.safetensors'))
        assert_same_features(vit, backbone)


def test_registers_of_dinov2(tmp_path):
    """Its [CLS] has a position, and timm's has it added."""
    theirs = timm_vit(reg_tokens=2, no_embed_class=True, init_values=1e-5)
    weights = theirs.state_dict()
    position = torch.randn(1, 1, 48)
    published = dict(
        {k: v for k, v in weights.items() if k != 'reg_token'},
        register_tokens=weights['reg_token'],
        cls_token=weights['cls_token'] - position,
        pos_embed=torch.cat([position, weights['pos_embed']], dim=1),
        mask_token=torch.zeros(1, 48),
    )
    torch.save(published, tmp_path / 'dinov2.pth')
    arguments = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3)
    arguments.update(reg_tokens=2, no_embed_class=True, init_values=1e-5)
    arguments['mlp_ratio'] = ARCH['feedforward_channels'] / ARCH['embed_dims']
    ours = dict(type='SERTimmViT', model='vit_tiny_patch16_224', model_args=arguments)
    with torch.no_grad():
        loaded = build_backbone(config(ours), str(tmp_path / 'dinov2.pth'))
        images = torch.randn(2, 3, 32, 32)
        expected = theirs.eval().forward_features(images)[:, 0]
    # Four blocks in float32; the position is taken away and added.
    torch.testing.assert_close(loaded(images)[-1], expected, rtol=0, atol=1e-4)


def test_foreign_vit_that_takes_the_mean(tmp_path):
    vit = timm_vit(global_pool='avg')
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    cfg = config(dict(OURS, out_type='avg_featmap', final_norm=False))
    with torch.no_grad():
        backbone = build_backbone(cfg, str(tmp_path / 'vit.pth'))
        assert_same_features(vit, backbone, lambda x: vit.fc_norm(x[:, 1:].mean(dim=1)))


@pytest.mark.parametrize('wrap', ['torchvision', 'MoCo v2', 'MoCo v3', 'SwAV'])
def test_foreign_resnet(wrap, tmp_path):
    theirs, average, swav = resnet18(), resnet18(), resnet18()
    swav.load_state_dict(theirs.state_dict())
    swav.projection_head = nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8))
    swav.prototypes = nn.Linear(8, 4, bias=False)
    content = {
        'SwAV': nn.DataParallel(swav),
        'torchvision': theirs,
        'MoCo v2': nn.DataParallel(modules(encoder_q=theirs, encoder_k=average)),
        'MoCo v3': nn.DataParallel(modules(momentum_encoder=average, base_encoder=theirs)),
    }[wrap]
    torch.save(dict(state_dict=content.state_dict()), tmp_path / 'resnet.pth')
    backbone = build_backbone(
        config(dict(type='SERResNet', depth=18)), str(tmp_path / 'resnet.pth')
    )
    state = theirs.state_dict()
    assert_filled(backbone, {k: v for k, v in state.items() if not k.startswith('fc.')})


def test_two_networks_that_fit_are_named_and_one_can_be_asked_for(tmp_path):
    left, right = timm_vit(), timm_vit()
    nn.init.zeros_(right.cls_token)
    file = str(tmp_path / 'pair.pth')
    torch.save(dict(state_dict=modules(left=left, right=right).state_dict()), file)
    with pytest.raises(ValueError, match=r"2 networks .*prefix='left\.' or prefix='right\.'"):
        build_backbone(config(OURS), file)
    assert build_backbone(config(OURS, prefix='left.'), file).cls_token.any()
    assert not build_backbone(config(OURS, prefix='right.'), file).cls_token.any()


def test_what_has_no_weights_says_what_it_has(tmp_path):
    torch.save(dict(epoch=3, args=argparse.Namespace(), parts=[1]), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=r'no weights.*epoch \(int\), args .*parts \(list\).*Save'):
        read_weights(str(tmp_path / 'a.pth'))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError, match='holds more than data: .*TorchScript'):
        read_weights(str(tmp_path / 'a.pth'))
    torch.save(timm_vit(reg_tokens=2).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='use the backbone config that it was .*reg_token'):
        load_backbone(build(OURS), str(tmp_path / 'a.pth'))


def test_options_and_paths_of_a_foreign_run_are_data(tmp_path):
    torch.save(trained(nn.Linear(2, 2)), tmp_path / 'a.pth')
    read = read_checkpoint(str(tmp_path / 'a.pth'))
    assert vars(read['args']).keys() == {'lr', 'output_dir', 'betas', 'clip'}
    assert str(read['args'].output_dir) == 'out' and not hasattr(read['args'].output_dir, 'open')
    assert type(read['args']) is not argparse.Namespace and read['loss'] == 1


def test_history_written_with_another_numpy_is_read(tmp_path):
    """numpy 2 calls its core another name."""
    history = HistoryBuffer([1.5, 2.5], [1, 1])
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(history=history), file, _use_new_zipfile_serialization=False)
    here = next(core for core in (b'numpy._core.', b'numpy.core.') if core in file.read_bytes())
    for core in (b'numpy._core.', b'numpy.core.'):
        file.write_bytes(file.read_bytes().replace(here, core))
        here = core
        assert read_checkpoint(str(file))['history'].mean() == 2.0


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


def test_of_many_missing_weights_few_are_named(tmp_path):
    torch.save(dict(state_dict={'backbone.0.weight': torch.zeros(2, 2)}), tmp_path / 'x.pth')
    backbone = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(100)))
    with pytest.raises(ValueError, match=r'0\.bias, .* and 196 more') as error:
        load_backbone(backbone, str(tmp_path / 'x.pth'), 'backbone.')
    assert len(str(error.value)) < 500
