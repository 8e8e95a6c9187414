"""Figures of a run: kept, and measured again when that is needed."""

import json
import shutil

import pytest
import torch
from mmpretrain.registry import DATASETS

from ser_mm.experiments.figures import evaluate, read_figures, turned
from ser_mm.files import read_kept
from ser_mm.geometry import NUM_ELEMENTS, act_on_array
from tests.support.probed import config, write_checkpoint


@pytest.fixture
def run(imagenet_tree, tmp_path):
    """Config of a run of a tiny network, its checkpoint, and the file of its figures."""
    shutil.copytree(imagenet_tree, tmp_path / 'data')
    cfg = config(tmp_path / 'data')
    cfg.merge_from_dict(dict(work_dir=str(tmp_path / 'run'), randomness=dict(seed=0)))
    return cfg, write_checkpoint(tmp_path / 'epoch_1.pth'), tmp_path / 'run.json'


def test_damaged_figures_are_told_and_measured_again(run, capsys):
    cfg, checkpoint, file = run
    found = evaluate(cfg, checkpoint, images=4)
    text = file.read_text()
    assert 'features of 16 images' in capsys.readouterr().out
    (file.with_suffix('.features')).mkdir()  # of one that was killed at its end
    assert evaluate(cfg, checkpoint, images=4) == found
    assert capsys.readouterr().out == '' and not file.with_suffix('.features').exists()

    file.write_text(text[: len(text) // 2])
    assert evaluate(cfg, checkpoint, images=4) == found
    assert f'{file} cannot be read' in capsys.readouterr().out and file.read_text() == text

    kept = json.loads(text)
    half = dict(kept, layers={**kept['layers'], 'mixture': []})
    damaged = [text[:length] for length in range(0, len(text) - 1, 100)]
    damaged += ['[]', '3', json.dumps(dict(about=kept['about'])), json.dumps(half), '\udcff\udcfe']
    for content in damaged:
        file.write_bytes(content.encode(errors='surrogateescape'))
        assert read_kept(file, read_figures) is None
        assert capsys.readouterr().out.startswith(f'{file} cannot be read')


def test_a_replaced_image_of_the_same_size_is_noticed(run, capsys):
    cfg, checkpoint, file = run
    first, *_, last = sorted((file.parent / 'data').glob('train/*/*'))
    size = max(x.stat().st_size for x in (first, last))
    first.write_bytes(first.read_bytes().ljust(size, b'\0'))
    before = evaluate(cfg, checkpoint, images=4)
    first.write_bytes(last.read_bytes().ljust(size, b'\0'))
    assert evaluate(cfg, checkpoint, images=4)['layers'] != before['layers']


def test_turned_images_are_those_of_validation_moved(run):
    """All else is as for the probe, of which they get a figure of their own."""
    cfg, checkpoint, _ = run
    datasets = [DATASETS.build(x) for x in (cfg.evaluation.val, turned(cfg.evaluation.val))]
    moved = 0
    for sample, other in zip(*datasets, strict=True):
        image, found = (x['inputs'].permute(1, 2, 0).numpy() for x in (sample, other))
        elements = [act_on_array(image, element) for element in range(NUM_ELEMENTS)]
        moved += not (found == image).all()
        assert any(x.shape == found.shape and (x == found).all() for x in elements)
        assert sample['data_samples'].gt_label == other['data_samples'].gt_label
    assert moved > len(datasets[0]) / 2
    found = evaluate(cfg, checkpoint, images=4)
    assert all(0 <= found[key] <= 1 for key in ('probe', 'probe_turned', 'knn'))


def test_other_weights_under_the_same_name_are_noticed(run):
    """Figures at the start stayed those of the first weights."""
    cfg, checkpoint, file = run
    algorithm = cfg.model.get('algorithm') or cfg.model
    options = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    algorithm.backbone.init_cfg = options
    before = evaluate(cfg, None, images=4)
    weights = torch.load(checkpoint, weights_only=True)
    for name, value in weights['state_dict'].items():
        if name.endswith('proj.weight'):
            value.normal_()
    torch.save(weights, checkpoint)
    assert evaluate(cfg, None, images=4)['layers'] != before['layers']
