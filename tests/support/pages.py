"""The code of a page of the documentation, run as its reader would: block by block, in a folder."""

import doctest
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

from tests.support.paths import ROOT

_BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_FILE = re.compile(r'# (\w+\.py)\n')
# Printed by the import of onedl-mmpretrain; and the log, which a reader sees between the lines.
_NOISE = re.compile(r'^(Could not import OneDL.*|\d\d/\d\d [\d:]{8} - mmengine - .*)\n', re.M)


def blocks(page):
    """Language, text and line of each block of a page, in their order."""
    text = Path(page).read_text()
    return [(m[1], m[2], text[: m.start()].count('\n') + 1) for m in _BLOCK.finditer(text)]


def run_page(page, folder):
    """Run the blocks of a page in a folder, by a Python of their own.

    A block of bash runs in a shell, one of Python in one namespace for all of them. One of Python
    that begins with the comment ``# NAME.py`` is written to that file. A block of text is what the
    block before it prints; '...' in it stands for anything.
    """
    call = f'from tests.support.pages import run_blocks; run_blocks({str(page)!r})'
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONPATH=str(ROOT))
    env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env["PATH"]}'
    done = subprocess.run(
        [sys.executable, '-c', call], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_blocks(page):
    names, printed = {'__name__': '__main__'}, ''
    for language, text, line in blocks(page):
        place = f'{Path(page).name}, line {line}'
        if language == 'bash':
            printed = _in_shell(text, place)
        elif language == 'python' and _FILE.match(text):
            Path(_FILE.match(text)[1]).write_text(text)
        elif language == 'python':
            printed = _in_python(text, place, names)
        elif language == 'text':
            assert_prints(text, printed, place)


def assert_prints(expected, printed, place):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    printed = _NOISE.sub('', printed)
    same = doctest.OutputChecker().check_output(expected, printed, options)
    assert same, f'{place}: expected\n{expected}\nprinted\n{printed}'


def _in_shell(text, place):
    shell = ['bash', '-euo', 'pipefail', '-c', text]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 0, f'{place}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    return done.stdout


def _in_python(text, place, names):
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, place, 'exec'), names)
    return printed.getvalue()


def notebook(page):
    """A page whose code is Python, as the content of a notebook."""
    text, cells, end = Path(page).read_text(), [], 0
    text = re.sub(r'\{\w+\}`~?([\w.]+)`', r'`\1`', text)  # links to the API
    for match in [*_BLOCK.finditer(text), None]:
        prose = text[end : match.start() if match else None].strip()
        if prose:
            cells.append(dict(cell_type='markdown', metadata={}, source=_lines(prose)))
        if match and match[1] == 'python':
            cell = dict(cell_type='code', metadata={}, execution_count=None, outputs=[])
            cells.append(cell | dict(source=_lines(match[2].strip())))
        end = match.end() if match else end
    for number, cell in enumerate(cells):
        cell['id'] = f'cell-{number}'
    kernel = dict(display_name='Python 3', language='python', name='python3')
    whole = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    return json.dumps(whole, indent=1) + '\n'


def _lines(text):
    return text.splitlines(keepends=True)


if __name__ == '__main__':
    for name in sys.argv[1:]:
        Path(name).with_suffix('.ipynb').write_text(notebook(name))
