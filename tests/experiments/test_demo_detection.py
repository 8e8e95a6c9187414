import json

import pytest

from ser_mm.experiments.demo_detection import pretrained_backbone, summarize
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
