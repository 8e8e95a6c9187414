"""Published protocols on pretrained backbones: what they say, and that they train."""

import inspect
import re
import subprocess
from math import prod

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS

from ser_mm.engine.configs import CONFIG_ROOT, shipped_configs
from ser_mm.engine.images import use_images
from ser_mm.engine.pretrained import check_pretrained
from ser_mm.evaluation import Embedder, FrozenClassifier
from tests.support.algorithms import ALGORITHMS, BACKBONE, build, dino, mlp
from tests.support.command import run_command
from tests.support.images import write_images
from tests.support.paths import ROOT
from tests.support.tiny_imagenet import write_tiny_imagenet

NAMES = sorted(name for name in shipped_configs() if name.startswith('benchmarks/'))
LINEAR = [name for name in NAMES if '/linear_' in name] + ['tiny_imagenet/linear_tiny']
VITS = [name for name in [*NAMES, *LINEAR[-1:]] if not name.endswith('r50')]
TINY = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)
R18 = dict(depth=18, stem_channels=16, base_channels=16)  # 128 channels in the end
# Images of a step, learning rate per 256 of them, weight decay, epochs, width of the features.
PUBLISHED = {
    'linear_mocov3_vits16': (1024, 3, 0, 90, 384),
    'linear_mocov3_r50': (1024, 0.1, 0, 90, 2048),
    'linear_dino_vits16': (1024, 0.001, 0, 100, 4 * 384),
    'linear_barlowtwins_r50': (256, 0.3, 1e-6, 100, 2048),
    'finetune_mocov3_vits16': (512, 5e-4 / 2, 0.05, 150, 384),
    'finetune_barlowtwins_r50': (256, 0.005, 0, 20, 2048),
}


def load(name, **options):
    cfg = Config.fromfile(CONFIG_ROOT / f'{name}.py')
    cfg.merge_from_dict(options)
    init_default_scope('mmpretrain')
    return cfg


def classifier(cfg):
    return MODELS.build(dict(cfg.model, data_preprocessor=cfg.data_preprocessor))


def make_small(cfg, checkpoint):
    """A tiny backbone for 64 x 64 pixels and two classes, and weights that it starts from."""
    model = cfg.model
    vit = 'arch' in model.backbone
    model.backbone.update(dict(arch=TINY, img_size=64) if vit else R18)
    model.head.update(num_classes=2, in_channels=48 * model.get('blocks', 1) if vit else 128)
    if 'blocks' in model:  # [CLS] is in the last of them
        model.backbone.cls_layer = 0
    cfg.data_preprocessor.num_classes = 2
    torch.manual_seed(1)
    network = MODELS.build(dict(model.backbone, init_cfg=None))
    network.init_weights()
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    start = model.backbone.init_cfg
    weights = {start.get('prefix', 'backbone.') + k: v for k, v in network.state_dict().items()}
    torch.save(dict(state_dict=weights), checkpoint)
    start.checkpoint = str(checkpoint)
    return cfg, network.state_dict()


def shrink_images(cfg):
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            for key in ('scale', 'crop_size'):
                if key in step:
                    step[key] = 64
        loader.update(num_workers=0, persistent_workers=False, batch_size=5)
    cfg.val_evaluator.topk = (1,)


@pytest.fixture(scope='module')
def classes(tmp_path_factory):
    """Six images in each of two class folders, of which one each is held out."""
    root = tmp_path_factory.mktemp('classes')
    write_images(root, *(f'{name}/{i}.png' for name in 'ab' for i in range(6)))
    return root


@pytest.mark.parametrize('name', NAMES)
def test_as_published(name):
    cfg = load(name)
    images, rate, decay, epochs, width = PUBLISHED[name.partition('/')[2]]
    optimizer = cfg.optim_wrapper.optimizer
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == images
    assert optimizer.lr * 256 / images == pytest.approx(rate)
    assert optimizer.weight_decay == decay
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == epochs
    assert cfg.param_scheduler[-1].T_max == epochs - cfg.param_scheduler[-1].begin
    assert cfg.model.head.in_channels == width
    linear = name in LINEAR
    assert cfg.model.type == ('FrozenClassifier' if linear else 'ImageClassifier')
    crop, flip = cfg.train_dataloader.dataset.pipeline[1:3]
    assert (crop.type, crop.scale, flip.type) == ('RandomResizedCrop', 224, 'RandomFlip')
    tested = [cfg[f'{split}_dataloader'].dataset.pipeline for split in ('val', 'test')]
    assert tested[0] == tested[1] and tested[0][1].scale == 256 and tested[0][2].crop_size == 224
    bicubic = 'dino' in name or name == 'benchmarks/finetune_mocov3_vits16'
    assert (tested[0][1].get('interpolation') == 'bicubic') == bicubic

    model = classifier(cfg)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ['head.fc.weight', 'head.fc.bias'] or not linear
    assert linear or len(trained) == len(list(model.parameters()))
    fc = model.head.layers.head if 'layers' in dir(model.head) else model.head.fc
    model.head.init_weights()
    assert (fc.bias == 0).all()
    # The deviation of n draws is off by 1 / sqrt(2 n) of itself; six times that never happens.
    std = 0.02 if name == 'benchmarks/finetune_mocov3_vits16' else 0.01
    assert float(fc.weight.detach().std()) == pytest.approx(
        std, rel=6 / (2 * prod(fc.weight.shape)) ** 0.5
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', [*NAMES, LINEAR[-1]])
def test_trains_what_it_should(name, classes, tmp_path):
    cfg, start = make_small(load(name), tmp_path / 'start.pth')
    if 'arch' in cfg.model.backbone:
        cfg.model.backbone.update(drop_rate=0.1, drop_path_rate=0.5)
    use_images(cfg, classes)
    shrink_images(cfg)
    cfg.train_cfg.max_epochs = 1
    # Without the config as a whole, which takes seconds to be written down nicely.
    options = {key: cfg[key] for key in inspect.signature(Runner).parameters if key in cfg}
    name_of_run = re.sub(r'\W', '_', str(tmp_path))
    runner = Runner(**options, work_dir=str(tmp_path), experiment_name=name_of_run)
    head = {k: v.clone() for k, v in runner.model.head.state_dict().items()}
    model = runner.train()
    assert runner.iter == 2 and 0 <= runner.message_hub.get_scalar('val/accuracy/top1').current()
    optimized = {
        id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']
    }
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    found = model.backbone.state_dict()
    assert found.keys() == start.keys()
    if name in LINEAR:
        assert optimized == {id(p) for p in model.head.parameters()}
        for key, value in found.items():
            assert torch.equal(value, start[key]), key
        assert all(p.grad is None for p in model.backbone.parameters())
        assert not any(module.training for module in model.train().backbone.modules())
        assert model.head.training
    else:
        stepped = runner.optim_wrapper.optimizer.state
        assert all(p in stepped for p in model.parameters())
        moved = 'bn1.running_mean' if 'r50' in name else 'ln1.weight'
        assert not torch.equal(found[moved], start[moved])
    assert all(not torch.equal(v, head[k]) for k, v in model.head.state_dict().items())


@pytest.mark.parametrize('name', LINEAR)
def test_features_are_those_of_the_probe_and_nothing_is_kept(name, tmp_path):
    cfg, _ = make_small(load(name), tmp_path / 'start.pth')
    model = classifier(cfg).train()
    model.init_weights()
    images = torch.randn(3, 3, 64, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        (features,) = model.extract_feat(images)
    assert not kept and not features.requires_grad
    embedder = Embedder(cfg, cfg.model.backbone.init_cfg.checkpoint, cfg.model.get('blocks', 1))
    with torch.no_grad():
        assert torch.equal(features, embedder(images))  # by the same operations
    assert torch.equal(model(images), model.head((features,)))


@pytest.mark.parametrize('name', [*NAMES, LINEAR[-1]])
def test_missing_weights_are_one_sentence(name):
    with pytest.raises(FileNotFoundError, match=r'model\.backbone\.init_cfg\.checkpoint = .*work_'):
        check_pretrained(load(name))


@pytest.mark.parametrize('name', VITS)
def test_weights_with_cls_elsewhere_are_refused(name, tmp_path):
    cfg, _ = make_small(load(name), tmp_path / 'start.pth')
    own = cfg.model.backbone.cls_layer
    cfg.model.backbone.cls_layer = 1 - min(own, 1)
    cfg.model.pop('blocks', None)
    with pytest.raises(ValueError, match=f'set cls_layer={own}'):
        classifier(cfg).init_weights()


def test_of_dino_the_teacher_is_evaluated(tmp_path):
    algorithm = build(dino({**BACKBONE, 'ser_layer': None}, mlp(48)))
    for parameter in algorithm.teacher.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(dict(state_dict=algorithm.state_dict()), tmp_path / 'dino.pth')
    cfg = load('benchmarks/linear_dino_vits16')
    backbone = {k: x for k, x in BACKBONE.items() if k != 'ser_layer'}
    cfg.model.backbone.update(backbone, cls_layer=0)
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'dino.pth')
    model = classifier(cfg)
    model.init_weights()
    teacher = algorithm.teacher.module[0].state_dict()
    assert all(torch.equal(x, teacher[key]) for key, x in model.backbone.state_dict().items())

    torch.save(build(ALGORITHMS['mocov3']).state_dict(), tmp_path / 'dino.pth')
    with pytest.raises(ValueError, match=r"No weight .* starts with prefix='teacher\.module\.0\.'"):
        classifier(cfg).init_weights()


@pytest.mark.slow
def test_commands_of_the_page(tmp_path, monkeypatch):
    """Linear evaluation, its test, and k-NN beside it, by the commands, at the size of noise."""
    monkeypatch.chdir(tmp_path)
    write_tiny_imagenet(tmp_path / 'data/tiny-imagenet-200', classes=5, per_class=4)
    cfg = load('tiny_imagenet/linear_tiny')
    backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
    torch.save({f'backbone.{k}': v for k, v in backbone.state_dict().items()}, 'epoch_20.pth')
    weights = 'model.backbone.init_cfg.checkpoint=epoch_20.pth'
    few = ['train_dataloader.batch_size=10', 'train_cfg.max_epochs=1']
    few += ['train_dataloader.num_workers=0', 'val_dataloader.num_workers=0']
    assert run_command('train', 'linear_tiny', '--cfg-options', weights, *few) is None
    run = tmp_path / 'work_dirs' / 'linear_tiny'
    assert (
        run_command('test', 'linear_tiny', run / 'epoch_1.pth', '--cfg-options', *few[-1:]) is None
    )
    assert run_command('probe', 'linear_tiny', 'epoch_20.pth', '--epochs', 1, '--k', 1) is None
    refusal = run_command(
        'train', 'linear_tiny', '--cfg-options', weights, *few, 'model.backbone.cls_layer=0'
    )
    assert 'set cls_layer=2' in refusal and '\n' not in refusal


def test_list_of_the_page_for_one_percent(tmp_path):
    """The lines of the page make the list from SimCLR's names, and the data set reads it."""
    page = (ROOT / 'docs' / 'evaluation' / 'probes.md').read_text()
    (script,) = [x for x in re.findall(r'```bash\n(.*?)```', page, re.DOTALL) if 'awk' in x]
    root = tmp_path / 'data' / 'imagenet'
    write_images(root / 'train', *(f'n0{c}/n0{c}_{i}.JPEG' for c in '231' for i in range(3)))
    (tmp_path / '1percent.txt').write_text('n03_2.JPEG\nn01_0.JPEG\nn02_1.JPEG\n')
    subprocess.run(['bash', '-ec', script], cwd=tmp_path, check=True)
    cfg = load('benchmarks/finetune_barlowtwins_r50')
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root=str(root), metainfo=dict(classes=('a', 'b', 'c')), pipeline=[])
    dataset = Runner.build_dataloader(cfg.train_dataloader).dataset
    found = [dataset.get_data_info(i) for i in range(len(dataset))]
    names = [(info['img_path'].removeprefix(f'{root}/train/'), info['gt_label']) for info in found]
    assert names == [('n03/n03_2.JPEG', 2), ('n01/n01_0.JPEG', 0), ('n02/n02_1.JPEG', 1)]


def test_an_untrained_backbone_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handle', lambda x: told.append(x.msg))
    backbone = dict(type='SERVisionTransformer', arch=TINY, img_size=64)
    head = dict(type='LinearClsHead', num_classes=2, in_channels=48)
    FrozenClassifier(backbone, head).init_weights()
    assert any('set model.backbone.init_cfg.checkpoint' in text for text in told)


def test_weights_that_leave_a_part_of_another_backbone_at_random_are_refused(tmp_path):
    backbone = dict(type='VisionTransformer', arch=TINY, img_size=64, patch_size=16)
    weights = MODELS.build(backbone).state_dict()
    torch.save({f'backbone.{k}': x for k, x in weights.items()}, tmp_path / 'whole.pth')
    del weights['layers.1.attn.qkv.weight']
    torch.save({f'backbone.{k}': x for k, x in weights.items()}, tmp_path / 'part.pth')
    head = dict(type='LinearClsHead', num_classes=2, in_channels=48)

    def start(name):
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / name), prefix='backbone.')
        FrozenClassifier(dict(backbone, init_cfg=init_cfg), head).init_weights()

    start('whole.pth')
    with pytest.raises(ValueError, match=r'Missing in the file: .*layers\.1\.attn\.qkv\.weight'):
        start('part.pth')


def test_blocks_that_cannot_be_joined():
    head = dict(type='LinearClsHead', num_classes=2, in_channels=512)
    with pytest.raises(ValueError, match='blocks=2: .* for a ViT only, and this is SERResNet'):
        FrozenClassifier(dict(type='SERResNet', depth=18), head, blocks=2)
    late = dict(type='SERVisionTransformer', arch=TINY, img_size=64, cls_layer=3)
    with pytest.raises(ValueError, match=r'blocks=2: \[CLS\] is in the last 1 blocks'):
        FrozenClassifier(late, head, blocks=2)
