"""Pretrained backbones, frozen, in MMDetection: the shipped configs on a small COCO data set."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import timm
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from pycocotools.coco import COCO
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ser_mm.datasets import write_bundled_digits
from ser_mm.engine.checks import check_coco
from ser_mm.engine.cpu import check_data
from ser_mm.models import SERVisionTransformer, SimpleFPN
from ser_mm.views import ViewBatch
from tests.support.paths import ROOT

CONFIGS = sorted((ROOT / 'configs' / 'coco').glob('*.py'))
NAMES = [config.stem for config in CONFIGS]
DIGITS = tuple('0123456789')
TINY = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)


@pytest.fixture(scope='session')
def digits(tmp_path_factory) -> Path:
    """A COCO data set of four training and two validation images, 96 x 96."""
    root = tmp_path_factory.mktemp('coco') / 'digits'
    write_bundled_digits(root, num_train=4, num_val=2, size=96)
    return root


@pytest.fixture(autouse=True)
def detection_scope():
    init_default_scope('mmdet')


def load(name: str, **options) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / 'coco' / f'{name}.py')
    cfg.merge_from_dict(options)
    return cfg


def on_digits(root: Path) -> dict:
    """What a user changes to train on other data."""
    options = {}
    for split in ('train', 'val', 'test'):
        name = 'train' if split == 'train' else 'val'
        dataset = f'{split}_dataloader.dataset.'
        options |= {
            f'{dataset}data_root': f'{root}/',
            f'{dataset}ann_file': f'{name}.json',
            f'{dataset}data_prefix.img': f'{name}/',
            f'{dataset}metainfo.classes': DIGITS,
            f'{dataset}pipeline.{2 if split == "train" else 1}.scale': (96, 96),
            f'{split}_dataloader.num_workers': 0,
            f'{split}_dataloader.persistent_workers': False,
        }
        if split != 'train':
            options[f'{split}_evaluator.ann_file'] = f'{root}/val.json'
    return options


def with_classes(cfg: Config, count: int) -> Config:
    heads = cfg.model.get('roi_head', cfg.model)
    for head in ('bbox_head', 'mask_head'):
        if head in heads:
            heads[head].num_classes = count
    return cfg


def make_small(cfg: Config, checkpoint: Path) -> Config:
    """A tiny ViT in place of ViT-S, one epoch, and a checkpoint of random weights to start from."""
    backbone = cfg.model.backbone
    if 'arch' in backbone:
        backbone.update(arch=TINY, frozen_stages=4)
        cfg.model.neck.in_channels = 48
    torch.manual_seed(1)
    network = DETECTORS.build(dict(backbone, init_cfg=None))
    network.init_weights()
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    weights = {f'backbone.{key}': value for key, value in network.state_dict().items()}
    torch.save(dict(state_dict=weights), checkpoint)
    backbone.init_cfg.checkpoint = str(checkpoint)
    cfg.train_cfg.max_epochs = 1
    # Untrained, RetinaNet is sure of nothing, and then MMDetection reports nothing.
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).score_thr = 0.0
    return with_classes(cfg, 10)


def make_runner(cfg: Config, work_dir: Path) -> Runner:
    """MMEngine's own Runner, as MMDetection's tools make it."""
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = re.sub(r'\W', '_', str(work_dir))
    cfg.default_hooks.logger.interval = 1
    return Runner.from_cfg(cfg)


def backbone_weights(checkpoint: Path) -> dict:
    weights = torch.load(checkpoint)['state_dict']
    return {key.removeprefix('backbone.'): value for key, value in weights.items()}


def assert_same_weights(network: nn.Module, weights: dict) -> None:
    state = network.state_dict()
    assert state.keys() == weights.keys()
    for key, value in state.items():
        assert torch.equal(value, weights[key]), key


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


@pytest.mark.parametrize('name', [name for name in NAMES if '_ser_' in name])
def test_ser_and_baseline_differ_in_the_checkpoint_and_its_cls_layer_alone(name):
    ser, baseline = load(name), load(name.replace('_ser_', '_'))
    for cfg, pretraining in ((ser, name.split('_', 1)[1]), (baseline, name.split('_ser_')[1])):
        checkpoint = cfg.model.backbone.init_cfg.pop('checkpoint')
        assert checkpoint == f'work_dirs/{pretraining}/epoch_100.pth'
        assert (ROOT / 'configs' / f'{pretraining}.py').exists()
    # Where [CLS] is inserted belongs to the checkpoint, which another place refuses.
    assert ser.model.backbone.pop('cls_layer', 3) == 3
    assert ser.to_dict() == baseline.to_dict()


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


@pytest.mark.parametrize('name', ['faster-rcnn_ser_mocov3_vits16', 'retinanet_mocov3_r50'])
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
        assert torch.equal(output, reference)
    assert model.neck.training


def count_saved(network: nn.Module, images: torch.Tensor) -> tuple[int, tuple]:
    """Number of tensors that autograd keeps of a forward pass, and its outputs."""
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)
    return len(kept), outputs


@pytest.mark.parametrize('name', ['faster-rcnn_mocov3_vits16', 'faster-rcnn_mocov3_r50'])
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
def vit(tmp_path) -> dict:
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
        (dict(patch_size=8), 'size mismatch for patch_embed.projection.weight'),
        (dict(arch=dict(TINY, num_layers=5)), 'Missing key'),
        (dict(arch=dict(TINY, num_layers=3), frozen_stages=3), 'Unexpected key'),
        (dict(init_cfg=dict(prefix='module.')), "prefix='module.'"),
        (dict(init_cfg=dict(prefix='')), 'Missing key'),
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

    cfg = load('faster-rcnn_mocov3_vits16')
    cfg.model.backbone.update(
        arch=dict(SERVisionTransformer.arch_zoo['deit-tiny'], num_layers=3),
        frozen_stages=3,
        init_cfg=dict(checkpoint=path, prefix=''),
    )
    ours = DETECTORS.build(cfg.model.backbone)
    ours.init_weights()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    torch.testing.assert_close(ours(images)[0], expected, atol=1e-4, rtol=1e-4)


def test_plain_vit_classifier_loads_by_the_same_config(tmp_path):
    plain = dict(type='VisionTransformer', arch=TINY, img_size=224, patch_size=16)
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=48)
    with MODELS.switch_scope_and_registry('mmpretrain'):
        classifier = MODELS.build(dict(type='ImageClassifier', backbone=plain, head=head))
    classifier.init_weights()
    path = str(tmp_path / 'classifier.pth')
    torch.save(dict(state_dict=classifier.state_dict()), path)
    cfg = load('faster-rcnn_mocov3_vits16')
    cfg.model.backbone.update(arch=TINY, frozen_stages=4)
    cfg.model.backbone.init_cfg.checkpoint = path
    ours = DETECTORS.build(cfg.model.backbone)
    ours.init_weights()
    classifier.backbone.out_type = 'featmap'
    classifier.backbone.train(False)
    images = torch.randn(1, 3, 224, 160)
    with torch.no_grad():
        expected = classifier.backbone(images)[0]
    torch.testing.assert_close(ours(images)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('name', ['mask-rcnn_ser_mocov3_vits16', 'retinanet_ser_mocov3_vits16'])
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


def test_pyramid_is_that_of_vitdet():
    neck = SimpleFPN(in_channels=64, out_channels=32, num_outs=5)
    outs = neck((torch.randn(2, 64, 6, 10),))
    assert [tuple(out.shape) for out in outs] == [
        (2, 32, 24, 40),
        (2, 32, 12, 20),
        (2, 32, 6, 10),
        (2, 32, 3, 5),
        (2, 32, 2, 3),
    ]
    torch.testing.assert_close(outs[4], outs[3][..., ::2, ::2])  # no 3x3 window: P6 subsamples P5
    shapes = [
        {n.split('.')[1]: list(p.shape) for n, p in level.named_parameters(str(i)) if p.ndim > 1}
        for i, level in enumerate(neck.levels)
    ]
    assert [list(level.values()) for level in shapes] == [
        [[64, 32, 2, 2], [32, 16, 2, 2], [32, 16, 1, 1], [32, 32, 3, 3]],
        [[64, 32, 2, 2], [32, 32, 1, 1], [32, 32, 3, 3]],
        [[32, 64, 1, 1], [32, 32, 3, 3]],
        [[32, 64, 1, 1], [32, 32, 3, 3]],
    ]
    # Normalized over the channels of each place.
    torch.testing.assert_close(outs[0].mean(dim=1), torch.zeros(2, 24, 40), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ('argument', 'message'),
    [(dict(scale_factors=(3, 1)), 'scale_factors'), (dict(num_outs=3), 'num_outs=3')],
)
def test_pyramid_refuses(argument, message):
    with pytest.raises(ValueError, match=message):
        SimpleFPN(in_channels=64, **argument)


def test_written_annotations_fit_their_masks(tmp_path):
    root = tmp_path / 'digits'
    write_bundled_digits(root, num_train=12, num_val=6, size=128)
    for split, count in dict(train=12, val=6).items():
        coco = COCO(root / f'{split}.json')
        assert len(coco.imgs) == count
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            ys, xs = mask.nonzero()
            x, y, width, height = annotation['bbox']
            assert (x, y) == (xs.min(), ys.min())
            assert (x + width, y + height) == (xs.max() + 1, ys.max() + 1)
            assert annotation['area'] == mask.sum() > 0
    before = (root / 'train.json').stat().st_mtime_ns
    write_bundled_digits(root, num_train=12, num_val=6, size=128)
    assert (root / 'train.json').stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match='choose another folder'):
        write_bundled_digits(root, num_train=13, num_val=6, size=128)


def test_bad_data_is_told_before_training(digits):
    def config(**options) -> Config:
        cfg = load('mask-rcnn_mocov3_vits16', **(on_digits(digits) | options))
        return with_classes(cfg, 10)

    check_data(config())
    check_coco(config())
    with pytest.raises(FileNotFoundError, match=r'train_dataloader.dataset.ann_file = .none.json.'):
        check_data(config(**{'train_dataloader.dataset.ann_file': 'none.json'}))
    with pytest.raises(FileNotFoundError, match=r'val_evaluator.ann_file = .none.json.'):
        check_coco(config(**{'val_evaluator.ann_file': 'none.json'}))
    wrong_head = config()
    wrong_head.model.roi_head.mask_head.num_classes = 80
    with pytest.raises(ValueError, match=r'mask_head.num_classes = 80, .* 10 classes'):
        check_coco(wrong_head)
    with pytest.raises(ValueError, match=r'train_dataloader.dataset.metainfo.classes .* without'):
        check_coco(config(**{'train_dataloader.dataset.metainfo.classes': ('cat', 'dog')}))
    with pytest.raises(ValueError, match=r'val_dataloader.dataset.metainfo.classes .* order'):
        check_coco(config(**{'val_dataloader.dataset.metainfo.classes': DIGITS[::-1]}))


TOOLS = ROOT / 'tools'
PATH = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'


def run(*command, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    env = os.environ | dict(PYTHONPATH=str(ROOT))  # MMDetection's tools look elsewhere
    return subprocess.run(command, cwd=ROOT, env=env, check=check, text=True, stdout=-1, stderr=-2)


def dump(cfg: Config, folder: Path) -> Path:
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_dataloader.dataset.ann_file=none.json', "ann_file = 'none.json'"),
        ('model.roi_head.bbox_head.num_classes=11', 'bbox_head.num_classes = 11'),
    ],
)
def test_train_tool_tells_bad_data_in_one_line(digits, tmp_path, option, message):
    cfg = with_classes(load('faster-rcnn_ser_mocov3_vits16', **on_digits(digits)), 10)
    command = [TOOLS / 'train.py', dump(cfg, tmp_path), '--work-dir', tmp_path / 'run']
    out = run(*command, '--cfg-options', option, check=False)
    assert out.returncode == 1
    assert out.stdout.splitlines()[-1].startswith('error: ') and message in out.stdout
    assert 'Traceback' not in out.stdout
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def pretrained(imagenet_tree, tmp_path_factory) -> Path:
    """What ``tools/train.py configs/ser_mocov3_vits16.py`` leaves after two steps."""
    work_dir = tmp_path_factory.mktemp('pretrained')
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=8',
        'train_dataloader.num_workers=0',
        f'train_dataloader.dataset.data_root={imagenet_tree}',
        'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
    ]
    config = ROOT / 'configs' / 'ser_mocov3_vits16.py'
    run(TOOLS / 'train.py', config, '--work-dir', work_dir, '--cfg-options', *options)
    return work_dir / 'epoch_1.pth'


@pytest.mark.slow
def test_pretraining_checkpoint_fills_the_detector_and_gives_the_same_maps(pretrained):
    cfg = load('faster-rcnn_ser_mocov3_vits16')
    cfg.model.backbone.init_cfg.checkpoint = str(pretrained)
    detector = DETECTORS.build(cfg.model)
    detector.init_weights()
    detector.eval()
    content = torch.load(pretrained, weights_only=False)['state_dict']
    weights = {k.removeprefix('backbone.'): v for k, v in content.items() if 'backbone.' in k[:9]}
    assert_same_weights(detector.backbone, weights)

    pretraining = Config.fromfile(ROOT / 'configs' / 'ser_mocov3_vits16.py')
    init_default_scope('mmpretrain')
    algorithm = MODELS.build(pretraining.model)
    algorithm.load_state_dict(content)
    algorithm.eval()
    bgr = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    theirs = algorithm.data_preprocessor(dict(inputs=bgr, data_samples=None))['inputs']
    ours = detector.data_preprocessor(
        dict(inputs=list(bgr), data_samples=[mmdet.structures.DetDataSample()])
    )['inputs']
    torch.testing.assert_close(ours, theirs)

    views = ViewBatch(base=theirs[:0], equi=theirs, elements=torch.zeros(1, dtype=torch.int64))
    online = algorithm.backbone
    with torch.no_grad():
        online(views)
        online.out_type = detector.backbone.out_type
        torch.testing.assert_close(detector.backbone(ours)[0], online(theirs)[0])
        detector.backbone.out_indices = [online.ser_layer - 1]
        torch.testing.assert_close(detector.backbone(ours)[0], views.token_maps[online])


@pytest.mark.slow
def test_tools_train_and_test_a_detector(digits, tmp_path):
    cfg = make_small(
        load('faster-rcnn_ser_mocov3_vits16', **on_digits(digits)), tmp_path / 'start.pth'
    )
    config = dump(cfg, tmp_path)
    mmdet_tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    run(mmdet_tools / 'train.py', config, '--work-dir', tmp_path / 'mmdet')
    run(TOOLS / 'train.py', config, '--work-dir', tmp_path / 'ours')
    checkpoint = tmp_path / 'ours' / 'epoch_1.pth'
    logged = (tmp_path / 'ours').glob('*/vis_data/scalars.json')
    trained = re.findall(r'"coco/bbox_mAP": ([\d.]+)', next(logged).read_text())[-1]

    test = [TOOLS / 'test.py', config, checkpoint, '--work-dir', tmp_path / 'test']
    out = run(*test, '--out', tmp_path / 'out.pkl', '--show-dir', 'shown').stdout
    tested = re.findall(r'coco/bbox_mAP: ([\d.]+)', out)[-1]
    assert float(tested) == pytest.approx(float(trained), abs=1e-3)
    assert (tmp_path / 'out.pkl').stat().st_size > 0
    assert len(list((tmp_path / 'test').glob('*/shown/*.png'))) == 2
    assert 'coco/bbox_mAP' in run(*test, '--tta').stdout

    weights = torch.load(checkpoint, weights_only=False)
    del weights['state_dict']['neck.levels.0.0.weight']
    torch.save(weights, checkpoint)
    out = run(*test, check=False)
    assert out.returncode != 0 and 'neck.levels.0.0.weight' in out.stdout


@pytest.mark.slow
def test_distributed_tools_run_a_detector(digits, tmp_path):
    cfg = make_small(load('faster-rcnn_mocov3_vits16', **on_digits(digits)), tmp_path / 'start.pth')
    config = dump(cfg, tmp_path)
    for script, arguments in {
        'dist_train.sh': [config, 2],
        'dist_test.sh': [config, tmp_path / 'run' / 'epoch_1.pth', 2],
    }.items():
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = str(probe.getsockname()[1])
        out = subprocess.run(
            ['bash', f'tools/{script}', *map(str, arguments), '--work-dir', str(tmp_path / 'run')],
            cwd=ROOT,
            text=True,
            stdout=-1,
            stderr=-2,
            env={'VIRTUAL_ENV': sys.prefix, **os.environ, 'PORT': port, 'PATH': PATH},
        )
        assert out.returncode == 0, out.stdout[-3000:]
        assert 'coco/bbox_mAP' in out.stdout
    weights = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    start = backbone_weights(tmp_path / 'start.pth')
    assert all(torch.equal(weights[f'backbone.{key}'], value) for key, value in start.items())
