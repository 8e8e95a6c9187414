"""Detections are drawn on the pixels that the detector saw."""

import json

import pytest
from mmengine.registry import VISUALIZERS, init_default_scope
from mmengine.visualization import Visualizer
from PIL import Image

from ser_mm.datasets import write_bundled_digits
from tests.support.detection import load, make_runner, make_small, on_digits


@pytest.fixture
def turned(tmp_path):
    """A COCO data set of 96 x 64 JPEGs that an EXIF orientation would turn."""
    root = tmp_path / 'digits'
    write_bundled_digits(root, num_train=1, num_val=1, size=96)
    exif = Image.Exif()
    exif[274] = 6
    content = json.loads((root / 'val.json').read_text())
    for image in content['images']:
        picture = Image.open(root / 'val' / image['file_name']).crop((0, 0, 96, 64))
        image.update(file_name=f'{image["id"]}.jpg', height=64)
        picture.save(root / 'val' / image['file_name'], exif=exif)
    (root / 'val.json').write_text(json.dumps(content))
    return root


def test_images_are_drawn_as_they_are_stored(turned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init_default_scope('mmdet')
    cfg = make_small(load('retinanet_vits16', **on_digits(turned)), tmp_path / 'start.pth')
    cfg.default_hooks.visualization.update(draw=True, test_out_dir='shown')
    # As after other runs in this process: the last visualizer is not that of this run.
    VISUALIZERS.build(cfg.visualizer)
    Visualizer.get_instance('of another run')
    runner = make_runner(cfg, 'run')
    runner.test()
    drawn = sorted((tmp_path / 'run').rglob('*.jpg'))
    assert [file.name for file in drawn] == ['0.jpg']
    # The truth beside what was found.
    assert {Image.open(file).size for file in drawn} == {(2 * 96, 64)}
