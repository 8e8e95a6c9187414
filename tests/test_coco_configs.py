"""Pretrained backbones, frozen, in MMDetection: the shipped configs on a small COCO data set."""

import re

import mmdet
import pytest
import timm
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ser_mm.datasets import write_bundled_digits
from ser_mm.models import SERVisionTransformer
from tests.support.detection import (
    NAMES,
    TINY,
    assert_same_weights,
    backbone_weights,
    load,
    make_runner,
    make_small,
    on_digits,
)

# Of float64, as for the tiny networks that tests/models checks it for.
CLOSE = dict(rtol=1e-9, atol=1e-9)
CLS_FROM_INPUT = {'model.backbone.cls_layer': 0}  # as in weights of other algorithms


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A COCO data set of four training and two validation images, 96 x 96."""
    root = tmp_path_factory.mktemp('coco') / 'digits'
    write_bundled_digits(root, num_train=4, num_val=2, size=96)
    return root


@pytest.fixture(autouse=True)
def detection_scope():
    init_default_scope('mmdet')


@pytest.mark.parametrize('name', NAMES)
def test_config_builds_and_its_pyramid_has_the_strides_of_its_anchors(name):
    cfg = load(name)
    detector = DETECTORS.build(cfg.model).eval()
    head = detector.rpn_head if 'rpn_head' in cfg.model else detector.bbox_head
    with torch.no_grad():
        levels = detector.extract_feat(torch.randn(1, 3, 256, 256))
    sizes = [level.shape[-1] for level in levels]
    assert sizes == [256 // stride for stride, _ in head.prior_generator.strides]
    assert len({level.shape[1] for level in levels}) == 1


@pytest.mark.parametrize('name', NAMES)
def test_one_line_unfreezes(name):
    frozen, trained = (
        DETECTORS.build(load(name, **option).model.backbone)
        for option in ({}, {'model.backbone.frozen_stages': -1})
    )
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_config_trains_and_evaluates(name, digits, tmp_path):
    cfg = make_small(load(name, **on_digits(digits)), tmp_path / 'start.pth')
    runner = make_runner(cfg, tmp_path)
    model = runner.train()
    assert runner.iter == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    stepped = runner.optim_wrapper.optimizer.state
    assert all(parameter in stepped for parameter in model.parameters() if parameter.requires_grad)
    metrics = runner.val_loop.run()
    kinds = ('bbox', 'segm') if name.startswith('mask') else ('bbox',)
    assert all(0 <= metrics[f'coco/{kind}_mAP'] <= 1 for kind in kinds)


@pytest.mark.parametrize('name', ['faster-rcnn_vits16', 'retinanet_r50'])
def test_frozen_backbone_stays_bit_identical_and_out_of_the_optimizer(name, digits, tmp_path):
    cfg = make_small(load(name, **on_digits(digits)), tmp_path / 'start.pth')
    if 'arch' in cfg.model.backbone:
        cfg.model.backbone.update(drop_rate=0.1, drop_path_rate=0.5)
    runner = make_runner(cfg, tmp_path)
    model = runner.train()
    assert_same_weights(model.backbone, backbone_weights(tmp_path / 'start.pth'))

    optimized = {
        id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']
    }
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    assert not optimized & {id(p) for p in model.backbone.parameters()}
    assert all(p.grad is None for p in model.backbone.parameters())

    # Whatever the Runner sets, the output is that of eval mode, and nothing is kept for backward.
    images = torch.randn(2, 3, 96, 96)
    model.eval()
    expected = model.backbone(images)
    model.train()
    random_layers = [
        module
        for module in model.backbone.modules()
        if isinstance(module, _BatchNorm | nn.Dropout) or type(module).__name__ == 'DropPath'
    ]
    assert random_layers and not any(module.training for module in random_layers)
    kept, outputs = count_saved(model.backbone, images)
    assert kept == 0
    for output, reference in zip(outputs, expected, strict=True):
        assert not output.requires_grad
        assert torch.equal(output, reference)  # by the same operations
    assert model.neck.training


def count_saved(network, images):
    """Number of tensors that autograd keeps of a forward pass, and its outputs."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)
    return len(kept), outputs


@pytest.mark.parametrize('name', ['faster-rcnn_vits16', 'faster-rcnn_r50'])
def test_an_unfrozen_backbone_keeps_activations(name, tmp_path):
    cfg = make_small(load(name), tmp_path / 'start.pth')
    cfg.model.backbone.frozen_stages = -1
    backbone = DETECTORS.build(cfg.model).train().backbone
    assert count_saved(backbone, torch.randn(1, 3, 96, 96))[0] > 0


def test_partly_frozen_vit_trains_the_rest():
    network = SERVisionTransformer(TINY, frozen_stages=2, drop_path_rate=0.5).train()
    modes = [[m.training for m in layer.modules()] for layer in network.layers]
    assert not any(modes[0] + modes[1]) and all(modes[2] + modes[3])
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in network.named_parameters() if n.startswith(('layers.2', 'layers.3', 'ln1'))
    }


@pytest.fixture
def vit(tmp_path):
    """Config of a tiny frozen backbone with a late [CLS], and a checkpoint that fits it."""
    config = dict(
        type='mmpretrain.SERVisionTransformer', arch=TINY, img_size=64, cls_layer=2, frozen_stages=4
    )
    network = SERVisionTransformer(**{k: v for k, v in config.items() if k != 'type'})
    network.init_weights()
    path = tmp_path / 'vit.pth'
    torch.save({f'backbone.{key}': value for key, value in network.state_dict().items()}, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    return dict(config, init_cfg=init_cfg)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(cls_layer=0), 'set cls_layer=2'),
        (
            dict(patch_size=8),
            'patch_embed.projection.weight (48, 3, 16, 16 in the file, 48, 3, 8, 8 in the network)',
        ),
        (dict(arch=dict(TINY, num_layers=5)), 'Missing in the file'),
        (
            dict(arch=dict(TINY, num_layers=3), frozen_stages=3),
            'Not in the network: layers.3.ln1.weight',
        ),
        (dict(init_cfg=dict(prefix='module.')), "prefix='module.'"),
        (dict(init_cfg=dict(prefix='')), 'Missing in the file'),
        (dict(init_cfg=dict(checkpoint='missing.pth')), 'missing.pth'),
    ],
)
def test_a_wrong_checkpoint_is_an_error(vit, change, message):
    vit['init_cfg'] |= change.pop('init_cfg', {})
    network = DETECTORS.build(dict(vit, **change))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        network.init_weights()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_timm_weights_load_by_the_same_config(tmp_path, suffix):
    torch.manual_seed(0)
    theirs = timm.create_model('vit_tiny_patch16_224', depth=3).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = str(tmp_path / f'timm{suffix}')
    (save_file if suffix == '.safetensors' else torch.save)(theirs.state_dict(), path)

    cfg = load('faster-rcnn_vits16', **CLS_FROM_INPUT)
    cfg.model.backbone.update(
        arch=dict(SERVisionTransformer.arch_zoo['deit-tiny'], num_layers=3),
        frozen_stages=3,
        init_cfg=dict(checkpoint=path, prefix=''),
    )
    ours = DETECTORS.build(cfg.model.backbone)
    ours.init_weights()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        tokens = theirs.double().forward_features(images)[:, 1:]
    expected = tokens.transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(ours.double()(images)[0], expected, **CLOSE)


def test_plain_vit_classifier_loads_by_the_same_config(tmp_path):
    plain = dict(type='VisionTransformer', arch=TINY, img_size=224, patch_size=16)
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=48)
    with MODELS.switch_scope_and_registry('mmpretrain'):
        classifier = MODELS.build(dict(type='ImageClassifier', backbone=plain, head=head))
    classifier.init_weights()
    path = str(tmp_path / 'classifier.pth')
    torch.save(dict(state_dict=classifier.state_dict()), path)
    cfg = load('faster-rcnn_vits16', **CLS_FROM_INPUT)
    cfg.model.backbone.update(arch=TINY, frozen_stages=4)
    cfg.model.backbone.init_cfg.checkpoint = path
    ours = DETECTORS.build(cfg.model.backbone)
    ours.init_weights()
    classifier.backbone.out_type = 'featmap'
    classifier.backbone.train(False)
    images = torch.randn(1, 3, 224, 160, dtype=torch.float64)
    with torch.no_grad():
        expected = classifier.backbone.double()(images)[0]
    torch.testing.assert_close(ours.double()(images)[0], expected, **CLOSE)


@pytest.mark.parametrize('name', ['mask-rcnn_vits16', 'retinanet_vits16'])
@pytest.mark.parametrize('size', [(320, 320), (480, 640), (800, 1333), (1333, 800)])
def test_sizes_through_the_whole_detector(name, size, tmp_path):
    cfg = make_small(load(name), tmp_path / 'start.pth')
    model = cfg.model
    narrow = dict(out_channels=16)
    model.neck.update(narrow)
    if 'rpn_head' in model:
        model.rpn_head.update(in_channels=16, feat_channels=16)
        for part in ('bbox', 'mask'):
            model.roi_head[f'{part}_roi_extractor'].update(narrow)
            model.roi_head[f'{part}_head'].in_channels = 16
    else:
        model.bbox_head.update(in_channels=16, feat_channels=16)
    detector = DETECTORS.build(model).eval()
    detector.init_weights()
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    sample = mmdet.structures.DetDataSample(
        metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)
    )
    (result,) = detector.test_step(dict(inputs=[image], data_samples=[sample]))
    instances = result.pred_instances
    assert len(instances) > 0
    height, width = size
    limits = torch.tensor([width, height, width, height])
    assert ((instances.bboxes >= 0) & (instances.bboxes <= limits)).all()
    if name.startswith('mask'):
        assert instances.masks.shape[-2:] == size
