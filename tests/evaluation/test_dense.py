"""The measures of networks: which maps they look at, and what the tables say."""

import json

import pytest
import torch

from ser_mm.evaluation.dense import MEASURES, measure_dense, report_dense, select_maps
from tests.support.algorithms import RESNET
from tests.support.probed import config

SMALL = dict(images=4, step=60, affine=1)


def maps_of_three(images):
    return [torch.full((len(images), i, 2, 2), float(i)) for i in (1, 2, 3)]


def test_layers_are_counted_from_1():
    images = torch.zeros(2, 3, 8, 8)
    assert [f.shape[1] for f in select_maps(maps_of_three)(images)] == [1, 2, 3]
    assert [f.shape[1] for f in select_maps(maps_of_three, [3, 1])(images)] == [3, 1]
    with pytest.raises(ValueError, match=r'layers=\[1, 4\]: the network has 3, .* leave out 4'):
        select_maps(maps_of_three, [1, 4])(images)
    with pytest.raises(ValueError, match=r'a block gives \(2, 3\), not a token map'):
        select_maps(lambda x: [x.mean(dim=(2, 3))])(images)


def test_measures_are_known():
    with pytest.raises(ValueError, match=r"measures=\['depth'\]: choose one or more of corresp"):
        measure_dense(None, None, ['depth'])


@pytest.mark.parametrize('backbone', [None, dict(RESNET, depth=18)], ids=['vit', 'resnet'])
def test_correspondence_of_a_network(backbone, imagenet_tree):
    cfg = config(imagenet_tree)
    if backbone:
        cfg.model.algorithm.backbone = backbone
    found = measure_dense(cfg, None, ['correspondence'], [1, 3], **SMALL)
    assert found['layers'] == [1, 3]
    scores = found['correspondence']
    assert list(scores) == ['0', '60', '120', '180', '240', '300', 'affine']
    assert all(len(layers) == 2 for layers in scores.values())
    assert scores['0'][0]['matched'] == 1
    everything = measure_dense(cfg, None, ['correspondence'], **SMALL)['correspondence']
    for name, layers in scores.items():
        for layer, same in zip(layers, everything[name][:3:2], strict=True):
            assert layer == pytest.approx(same, nan_ok=True, abs=0)
    text = report_dense(json.loads(json.dumps(found)))
    assert '| wrong image, between ' in text and text.count('block 3') == 2
    assert set(MEASURES) >= set(found) - {'layers'}


@pytest.mark.parametrize('backbone', [None, dict(RESNET, depth=18)], ids=['vit', 'resnet'])
def test_probes_of_a_network(backbone, imagenet_tree):
    cfg = config(imagenet_tree)
    if backbone:
        cfg.model.algorithm.backbone = backbone
    found = measure_dense(cfg, None, ['angle', 'position'], train_images=12, **SMALL)
    assert list(found['angle']) == ['0', '60', '120', '180', '240', '300']
    # Of 4 images a class each, and at 0 degrees nothing is sampled anew.
    upright = found['angle']['0']
    assert upright['chance'] == 0.25 and upright['knn'] == upright['knn_back']
    assert len(found['position']['layers']) == 4
    assert found['position']['pixels']['r2'] < 1
    text = report_dense(json.loads(json.dumps(found)))
    assert '| mean, between ' in text and '| R2 of the row ' in text
