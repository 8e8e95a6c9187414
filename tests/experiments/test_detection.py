import json

import pytest
from mmengine.config import Config

from ser_mm.experiments.detection import pretrained_backbone, read_metrics, summarize
from tests.support.paths import ROOT

RESULTS = ROOT / 'docs' / 'results' / 'demo' / 'detection'


def test_the_published_table_follows_from_its_results():
    content = json.loads((RESULTS / 'results.json').read_text())
    cells, published = (
        [[cell.strip() for cell in line.split('|')] for line in table.splitlines()[2:6]]
        for table in (summarize(content['results']), (RESULTS / 'table.md').read_text())
    )
    assert cells == published and len(cells) == 4


def test_a_missing_pretraining_is_told_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no finished pretraining.*make demo ALGORITHM='):
        pretrained_backbone(tmp_path, 'mocov3', 'views only', 0)


def test_the_log_of_a_killed_run_is_read_up_to_its_end(tmp_path):
    file = tmp_path / 'start' / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    record = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.75, 'coco/segm_mAP': 0.25}
    whole = json.dumps(record).encode()
    file.write_bytes(b'\n'.join([whole, b'3', b'\xff\xfe', whole[:20]]))
    assert read_metrics(Config(dict(work_dir=str(tmp_path)))) == record
