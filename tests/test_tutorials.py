"""Every tutorial, run in an empty folder as its reader would."""

import json

import pytest

from tests.support.pages import blocks, notebook, run_page
from tests.support.paths import ROOT

TUTORIALS = ROOT / 'docs' / 'tutorials'
PAGES = sorted(page for page in TUTORIALS.glob('*.md') if page.stem != 'index')


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_does_and_prints_what_it_says(page, tmp_path):
    if page.stem == 'timm':
        pytest.importorskip('timm')
    run_page(page, tmp_path)


def test_the_notebook_is_the_page():
    """``python -m tests.support.pages docs/tutorials/token_maps.md`` writes it anew."""
    page = TUTORIALS / 'token_maps.md'
    written = page.with_suffix('.ipynb').read_text()
    assert written == notebook(page)
    cells = [''.join(x['source']) for x in json.loads(written)['cells'] if x['cell_type'] == 'code']
    assert cells == [text.strip() for language, text, _ in blocks(page) if language == 'python']
    assert not any(language == 'bash' for language, *_ in blocks(page))
