import json

import pytest

from ser_mm.experiments.demo_detection import detector_config, pretrained_backbone, summarize
from ser_mm.experiments.runs import check_settings
from tests.support.paths import ROOT

RESULTS = ROOT / 'docs' / 'results' / 'demo' / 'detection'


def test_the_published_table_follows_from_its_results():
    content = json.loads((RESULTS / 'results.json').read_text())
    cells, published = (
        [[cell.strip() for cell in line.split('|')] for line in table.splitlines()[2:6]]
        for table in (summarize(content['results']), (RESULTS / 'table.md').read_text())
    )
    assert cells == published and len(cells) == 4


def test_detectors_are_of_the_weights_not_of_their_file(tmp_path):
    """Of a pretraining that was removed and made again, they are others."""
    weights, configs = tmp_path / 'epoch_8.pth', []
    arch = dict(embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=192)
    init = dict(type='Pretrained', checkpoint=str(weights), prefix='backbone.')
    backbone = dict(type='SERVisionTransformer', arch=arch, img_size=48, patch_size=8)
    for content in ('first', 'second', 'second'):
        weights.write_text(content)
        backbone['init_cfg'] = dict(init)
        configs.append(detector_config(backbone, tmp_path, tmp_path / 'run', 0, {}))
    (tmp_path / 'run.py').write_text(configs[0].pretty_text)
    with pytest.raises(ValueError, match='run holds a run with other settings'):
        check_settings(configs[1])
    (tmp_path / 'run.py').write_text(configs[1].pretty_text)
    check_settings(configs[2])
    detector_config(dict(backbone, init_cfg=None), tmp_path, tmp_path / 'run', 0, {})


def test_a_missing_pretraining_is_told_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no finished pretraining.*make demo ALGORITHM='):
        pretrained_backbone(tmp_path, 'mocov3', 'views only', 0)
