"""Detectors on pretrained backbones, by ser-mm train and test, and by MMDetection's own tools."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.datasets import CocoDataset
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from PIL import Image

from ser_mm.cli.test import merge_args, parse_args
from ser_mm.datasets import write_bundled_digits
from ser_mm.evaluation.backbone import build_model
from ser_mm.views import ViewBatch
from tests.support.command import run_command
from tests.support.detection import (
    assert_same_weights,
    backbone_weights,
    load,
    make_small,
    on_digits,
    with_classes,
)
from tests.support.paths import ROOT
from tests.support.ports import free_port

PATH = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A COCO data set of four training and two validation images, 96 x 96."""
    root = tmp_path_factory.mktemp('coco') / 'digits'
    write_bundled_digits(root, num_train=4, num_val=2, size=96)
    return root


@pytest.fixture(autouse=True)
def detection_scope():
    init_default_scope('mmdet')


def python(*args, check=True):
    command = [sys.executable, *map(str, args)]
    env = os.environ | dict(PYTHONPATH=str(ROOT))  # MMDetection's tools look elsewhere
    return subprocess.run(command, cwd=ROOT, env=env, check=check, text=True, stdout=-1, stderr=-2)


def ser_mm(name, *args, check=True):
    """A command in a process of its own, as a Runner leaves much behind."""
    return python('-m', f'ser_mm.cli.{name}', *args, check=check)


def dump(cfg, folder):
    cfg.dump(folder / 'config.py')
    return folder / 'config.py'


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_dataloader.dataset.ann_file=none.json', "ann_file = 'none.json'"),
        ('model.roi_head.bbox_head.num_classes=11', 'bbox_head.num_classes = 11'),
        ('train_dataloader.dataset.metainfo.classes=cat', "classes = 'cat' is neither a file"),
        ('model.backbone.init_cfg.checkpoint=none.pth', "init_cfg.checkpoint = 'none.pth'"),
    ],
)
def test_train_tells_bad_data_in_one_line(digits, tmp_path, option, message):
    cfg = with_classes(load('faster-rcnn_vits16', **on_digits(digits)), 10)
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'start.pth')
    (tmp_path / 'start.pth').touch()
    args = [dump(cfg, tmp_path), '--work-dir', tmp_path / 'run', '--cfg-options', option]
    sentence = run_command('train', *args)
    assert sentence.startswith('error: ') and message in sentence and '\n' not in sentence
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('name', 'options', 'refused'),
    [
        ('mask-rcnn_vits16', [], True),
        ('retinanet_r50', [], False),
        ('faster-rcnn_vits16', [], False),
        ('faster-rcnn_vits16', ['test_evaluator.metric=[bbox,segm]'], True),
        ('mask-rcnn_vits16', ['tta_model.type=MergeMasksToo'], False),
    ],
)
def test_flips_of_masks_cannot_be_merged(name, options, refused):
    arguments = [f'coco/{name}', 'none.pth', '--tta']
    args = parse_args([*arguments, '--cfg-options', *options] if options else arguments)
    cfg = load(name)
    if not refused:
        merge_args(cfg, args)
        assert cfg.model.module.type == load(name).model.type
        return
    with pytest.raises(ValueError, match=f'^--tta: .*DetTTAModel merges boxes, and coco/{name}'):
        merge_args(cfg, args)


@pytest.fixture(scope='module')
def pretrained(imagenet_tree, tmp_path_factory):
    """What ``ser-mm train ser_mocov3_vits16`` leaves after two steps."""
    work_dir = tmp_path_factory.mktemp('pretrained')
    options = [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=8',
        'train_dataloader.num_workers=0',
        f'train_dataloader.dataset.data_root={imagenet_tree}',
        'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
    ]
    ser_mm('train', 'ser_mocov3_vits16', '--work-dir', work_dir, '--cfg-options', *options)
    return work_dir / 'epoch_1.pth'


@pytest.mark.slow
def test_pretraining_checkpoint_fills_the_detector_and_gives_the_same_maps(pretrained):
    cfg = load('faster-rcnn_vits16')
    cfg.model.backbone.init_cfg.checkpoint = str(pretrained)
    detector = DETECTORS.build(cfg.model)
    detector.init_weights()
    detector.eval()
    content = torch.load(pretrained, weights_only=False)['state_dict']
    weights = {k.removeprefix('backbone.'): v for k, v in content.items() if 'backbone.' in k[:9]}
    assert_same_weights(detector.backbone, weights)

    init_default_scope('mmpretrain')
    algorithm = build_model(Config.fromfile(ROOT / 'configs' / 'ser_mocov3_vits16.py'))
    algorithm.load_state_dict(content)
    algorithm.eval()
    bgr = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    theirs = algorithm.data_preprocessor(dict(inputs=bgr, data_samples=None))['inputs']
    ours = detector.data_preprocessor(
        dict(inputs=list(bgr), data_samples=[mmdet.structures.DetDataSample()])
    )['inputs']
    torch.testing.assert_close(ours, theirs)  # two operations of float32

    x = theirs.double()
    views = ViewBatch(base=x[:0], equi=x, elements=torch.zeros(1, dtype=torch.int64))
    online, backbone = algorithm.backbone.double(), detector.backbone.double()
    close = dict(rtol=1e-9, atol=1e-9)  # as for the tiny networks, which tests/models check
    with torch.no_grad():
        online(views)
        online.out_type = backbone.out_type
        torch.testing.assert_close(backbone(x)[0], online(x)[0], **close)
        backbone.out_indices = [online.ser_layer - 1]
        torch.testing.assert_close(backbone(x)[0], views.token_maps[online], **close)


@pytest.mark.slow
def test_commands_train_and_test_a_detector(digits, tmp_path):
    cfg = make_small(load('faster-rcnn_vits16', **on_digits(digits)), tmp_path / 'start.pth')
    config = dump(cfg, tmp_path)
    mmdet_tools = Path(mmdet.__file__).parent / '.mim' / 'tools'
    python(mmdet_tools / 'train.py', config, '--work-dir', tmp_path / 'mmdet')
    ser_mm('train', config, '--work-dir', tmp_path / 'ours')
    checkpoint = tmp_path / 'ours' / 'epoch_1.pth'
    logged = (tmp_path / 'ours').glob('*/vis_data/scalars.json')
    trained = re.findall(r'"coco/bbox_mAP": ([\d.]+)', next(logged).read_text())[-1]

    test = ['test', config, checkpoint, '--work-dir', tmp_path / 'test']
    out = ser_mm(*test, '--out', tmp_path / 'out.pkl', '--show-dir', 'shown').stdout
    tested = re.findall(r'coco/bbox_mAP: ([\d.]+)', out)[-1]
    assert float(tested) == pytest.approx(float(trained), abs=1e-3)  # printed to 4 places
    assert (tmp_path / 'out.pkl').stat().st_size > 0
    assert len(list((tmp_path / 'test').glob('*/shown/*.png'))) == 2
    assert 'coco/bbox_mAP' in ser_mm(*test, '--tta').stdout

    weights = torch.load(checkpoint, weights_only=False)
    del weights['state_dict']['neck.levels.0.0.weight']
    torch.save(weights, checkpoint)
    out = ser_mm(*test, check=False)
    assert out.returncode != 0 and 'neck.levels.0.0.weight' in out.stdout


@pytest.mark.slow
def test_distributed_tools_run_a_detector(digits, tmp_path):
    cfg = make_small(load('faster-rcnn_vits16', **on_digits(digits)), tmp_path / 'start.pth')
    config = dump(cfg, tmp_path)
    for script, arguments in {
        'dist_train.sh': [config, 2],
        'dist_test.sh': [config, tmp_path / 'run' / 'epoch_1.pth', 2],
    }.items():
        arguments = shlex.join(map(str, [*arguments, '--work-dir', tmp_path / 'run']))
        out = in_shell(f'bash tools/{script} {arguments}', ROOT)
        assert out.returncode == 0, out.stdout[-3000:]
        assert 'coco/bbox_mAP' in out.stdout
    weights = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    start = backbone_weights(tmp_path / 'start.pth')
    assert all(torch.equal(weights[f'backbone.{key}'], value) for key, value in start.items())


def documented_chain():
    """The commands of docs/howto/detection.md, from images to mAP."""
    text = (ROOT / 'docs' / 'howto' / 'detection.md').read_text()
    block = re.search(r'From images to mAP:\n\n```bash\n(.*?)```', text, re.DOTALL)[1]
    return block.replace('\\\n', ' ').splitlines()


# What makes them quick: two steps of each training, small images.
QUICK = {
    'configs/ser_mocov3_vits16.py': [
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=0',
        'train_dataloader.dataset.pipeline.1.equi_ratio=0.5',
    ],
    'configs/coco/mask-rcnn_vits16.py': [
        'train_cfg.max_epochs=1',
        *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
        'train_dataloader.dataset.pipeline.3.scale=(96,96)',
        *(f'{split}_dataloader.dataset.pipeline.2.scale=(96,96)' for split in ('val', 'test')),
        'model.test_cfg.rcnn.score_thr=0.0',
    ],
}


@pytest.fixture
def photographs(tmp_path):
    """A COCO data set of JPEGs in COCO's layout, with an EXIF orientation, and its categories."""
    write_bundled_digits(tmp_path / 'digits', num_train=4, num_val=2, size=96)
    root = tmp_path / 'coco'
    (root / 'annotations').mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6
    for split in ('train', 'val'):
        folder = root / f'{split}2017'
        folder.mkdir()
        content = json.loads((tmp_path / 'digits' / f'{split}.json').read_text())
        for image in content['images']:
            file = tmp_path / 'digits' / split / image['file_name']
            image['file_name'] = f'{file.stem}.jpg'
            Image.open(file).convert('RGB').save(folder / image['file_name'], exif=exif)
        classes = CocoDataset.METAINFO['classes']
        content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
        file = root / 'annotations' / f'instances_{split}2017.json'
        file.write_text(json.dumps(content))
    return root


@pytest.mark.slow
def test_from_images_to_map_by_the_documented_commands(
    imagenet_tree, photographs, tmp_path, monkeypatch
):
    places = {
        '/path/to/imagenet': str(imagenet_tree),
        '/path/to/coco': str(photographs),
        'tools/': f'{ROOT}/tools/',
        'epoch_100.pth': 'epoch_1.pth',
        'epoch_12.pth': 'epoch_1.pth',
        '.py 8': '.py 2',
        '.pth 8': '.pth 2',
    }
    for line in documented_chain():
        config = next((name for name in QUICK if name in line), None)
        for documented, here in places.items():
            line = line.replace(documented, here)
        if config:
            options = '' if '--cfg-options' in line else ' --cfg-options'
            line += f'{options} {" ".join(map(shlex.quote, QUICK[config]))}'
        out = in_shell(line, tmp_path)
        assert out.returncode == 0, out.stdout[-3000:]
    # pycocotools prints its table, and MMDetection logs it.
    assert re.search(r'Average Precision  \(AP\) @\[ IoU=0.50:0.95 .*\] = [\d.-]+', out.stdout)
    assert all(f'coco/{kind}_mAP' in out.stdout for kind in ('bbox', 'segm'))
    start, end = (
        torch.load(tmp_path / 'work_dirs' / name / 'epoch_1.pth', weights_only=False)['state_dict']
        for name in ('ser_mocov3_vits16', 'mask-rcnn_vits16')
    )
    backbone = [key for key in end if key.startswith('backbone.')]
    assert backbone and all(torch.equal(start[key], end[key]) for key in backbone)

    monkeypatch.chdir(tmp_path)
    assert_python_of_the_page_detects(end, next((photographs / 'val2017').iterdir()))


def assert_python_of_the_page_detects(weights, photo):
    """As the config's own test data do; the photograph is stored on its side."""
    shutil.copy(photo, 'photo.jpg')
    text = (ROOT / 'docs' / 'howto' / 'detection.md').read_text()
    block = re.search(r'```python\n((?:(?!```).)*DetInferencer.*?)```', text, re.DOTALL)[1]
    names: dict = {}
    exec(block.replace('epoch_12', 'epoch_1'), names)
    network, found = names['detect'].model, names['found']
    assert_same_weights(network, weights)
    assert list(Path('found', 'vis').iterdir())
    cfg = Config.fromfile(f'{names["run"]}/mask-rcnn_vits16.py')
    pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
    batch = pseudo_collate([pipeline(dict(img_path='photo.jpg', img_id=0))])
    with torch.no_grad():
        (expected,) = network.test_step(batch)
    assert len(found['labels']) == len(expected.pred_instances.labels) > 0
    for key in ('labels', 'scores', 'bboxes'):  # the same operations on the same numbers
        assert torch.equal(torch.tensor(found[key]), expected.pred_instances[key])


def in_shell(line, cwd):
    env = {'VIRTUAL_ENV': sys.prefix, **os.environ, 'PORT': str(free_port()), 'PATH': PATH}
    return subprocess.run(['bash', '-c', line], cwd=cwd, text=True, stdout=-1, stderr=-2, env=env)
