"""A detector on frozen backbones and the boxes of Tiny ImageNet."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS

from ser_mm.datasets import write_tiny_imagenet_boxes
from ser_mm.engine.configs import find_config
from ser_mm.experiments.boxes import METRICS, box_map, boxes_config, whole_image_map
from tests.support.detection import assert_same_weights, make_runner
from tests.support.tiny_imagenet import write_tiny_imagenet

ARCH = dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)
EARLY = dict(type='SERVisionTransformer', arch=ARCH, img_size=64, patch_size=8, cls_layer=0)
LATE = dict(EARLY, cls_layer=2)
QUICK = {'train_dataloader.batch_size': 4, 'train_cfg.max_epochs': 1}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tiny_imagenet(tmp_path_factory.mktemp('data') / 'tiny')


def write_weights(backbone, seed, file):
    """A checkpoint as a pretraining leaves it, and the weights in it."""
    torch.manual_seed(seed)
    network = MODELS.build(backbone)
    network.init_weights()
    torch.save({f'backbone.{k}': v for k, v in network.state_dict().items()}, file)
    return network.state_dict()


@pytest.mark.parametrize('size', [64, 128])
def test_the_shipped_detector_has_the_strides_of_its_anchors(size):
    init_default_scope('mmdet')
    detector = DETECTORS.build(Config.fromfile(find_config('faster-rcnn_tiny')).model).eval()
    with torch.no_grad():
        levels = detector.extract_feat(torch.randn(1, 3, size, size))
    sizes = [level.shape[-1] for level in levels]
    assert sizes == [size // stride for stride, _ in detector.rpn_head.prior_generator.strides]
    extractor = detector.roi_head.bbox_roi_extractor
    assert [size // stride for stride in extractor.featmap_strides] == sizes
    assert not any(p.requires_grad for p in detector.backbone.parameters())


class Watch(Hook):
    """What a run starts from, and the images that it sees."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.start, self.seen = copy.deepcopy(runner.model.state_dict()), []
        samples = data_batch['data_samples']
        self.seen += [(x.img_path, x.flip, x.gt_instances.bboxes.tensor.tolist()) for x in samples]


@pytest.mark.slow
def test_a_seed_gives_all_backbones_one_start_and_one_order(data, tmp_path):
    init_default_scope('mmpretrain')
    weights = {
        name: write_weights(backbone, seed, tmp_path / f'{name}.pth')
        for name, backbone, seed in (('early', EARLY, 1), ('late', LATE, 2))
    }
    init_default_scope('mmdet')
    runs = {}
    for name, backbone in (('early', EARLY), ('late', LATE)):
        work_dir = tmp_path / f'run_{name}'
        write_tiny_imagenet_boxes(data, work_dir / 'data', 4, 1)
        cfg = boxes_config(0, work_dir, data, backbone, 64, QUICK)
        cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / f'{name}.pth')
        runner = make_runner(cfg, work_dir)
        runs[name] = Watch()
        runner.register_hook(runs[name])
        trained = runner.train()
        assert runner.iter == 3
        assert_same_weights(trained.backbone, weights[name])
        moved = [
            n for n, p in trained.named_parameters() if not torch.equal(p, runs[name].start[n])
        ]
        assert {n.split('.')[0] for n in moved} == {'neck', 'rpn_head', 'roi_head'}
    rest = {
        name: {k: v for k, v in run.start.items() if not k.startswith('backbone.')}
        for name, run in runs.items()
    }
    assert all(torch.equal(rest['early'][k], v) for k, v in rest['late'].items())
    assert runs['early'].seen == runs['late'].seen and len(runs['late'].seen) == 12


def test_a_detector_is_of_the_weights_not_of_their_file(data, tmp_path, monkeypatch):
    """Of a pretraining that was made again in the same folder, it is another."""

    def trained(runs, metrics):
        ((name, cfg),) = runs.items()
        Path(f'{cfg.work_dir}.py').write_text(cfg.pretty_text)
        return {name: dict.fromkeys(metrics, 0.5)}

    monkeypatch.setattr('ser_mm.experiments.boxes.train_and_score', trained)
    weights = tmp_path / 'epoch_2.pth'
    call = dict(data_root=data, backbone=LATE, images=(2, 1), cfg_options=QUICK)
    for content in ('first', 'first'):
        weights.write_text(content)
        assert box_map(weights, 3, tmp_path / 'run', **call)['bbox_mAP'] == 0.5
    weights.write_text('second')
    with pytest.raises(ValueError, match='holds a run with other settings'):
        box_map(weights, 3, tmp_path / 'run', **call)


@pytest.mark.slow
def test_box_map_trains_once_and_scores(data, tmp_path):
    run = tmp_path / 'run'
    call = dict(data_root=data, backbone=LATE, images=(2, 1), cfg_options=QUICK)
    found = box_map(None, 3, run, **call)
    assert list(found) == list(METRICS) and all(0 <= x <= 1 for x in found.values())
    assert json.loads((tmp_path / 'run.json').read_text()) == found

    start = torch.load(tmp_path / 'run_random.pth')
    trained = torch.load(run / 'epoch_1.pth', weights_only=False)
    assert all(torch.equal(trained['state_dict'][key], value) for key, value in start.items())
    expected = write_weights(LATE, 3, tmp_path / 'again.pth')
    assert all(torch.equal(start[f'backbone.{key}'], x) for key, x in expected.items())

    # Interrupted before the score was there: it is made from what was trained.
    written = (run / 'epoch_1.pth').stat().st_mtime_ns
    (tmp_path / 'run.json').unlink()
    assert box_map(None, 3, run, **call) == found
    assert (run / 'epoch_1.pth').stat().st_mtime_ns == written
    (tmp_path / 'run.json').write_text(json.dumps(dict(found, bbox_mAP=0.5)))
    assert box_map(None, 3, run, **call)['bbox_mAP'] == 0.5  # is not scored again
    # The same weights by their name are the same run, others are not.
    assert box_map(tmp_path / 'run_random.pth', 3, run, **call)['bbox_mAP'] == 0.5
    with pytest.raises(ValueError, match='holds a run with other settings'):
        box_map(tmp_path / 'again.pth', 3, run, **call)
    with pytest.raises(ValueError, match='holds a run with other settings'):
        box_map(None, 4, run, **call)
    with pytest.raises(FileExistsError, match='holds something else'):
        box_map(None, 3, run, **call | dict(images=(1, 1)))


def test_a_missing_checkpoint_is_named_before_anything_is_written(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint='none.pth' is not a file"):
        box_map('none.pth', 0, tmp_path / 'run', data)
    assert not any(tmp_path.iterdir())


def test_the_floor_is_the_whole_image_as_the_only_box(tmp_path):
    """One of four objects is 64 x 64, one half of that, which counts at IoU 0.5 alone."""
    boxes = [[0, 0, 64, 64], [0, 0, 64, 32], [0, 0, 9, 9], [3, 3, 20, 20]]
    content = dict(
        images=[dict(id=i, file_name=f'{i}', width=64, height=64) for i in range(1, 5)],
        annotations=[
            dict(id=i, image_id=i, category_id=1, bbox=x, area=x[2] * x[3], iscrowd=0)
            for i, x in enumerate(boxes, 1)
        ],
        categories=[dict(id=1, name='object')],
    )
    file = tmp_path / 'val.json'
    file.write_text(json.dumps(content))
    # Scores are equal, so the images count in their order: at IoU 0.5 the first two of four are
    # found, at the others the first one. pycocotools averages precision at 101 recalls from 0 to 1.
    half, quarter = 51 / 101, 26 / 101
    expected = [(half + 9 * quarter) / 10, half, quarter]
    assert list(whole_image_map(file).values()) == [round(x, 3) for x in expected]
