"""Sphinx configuration. Build the site with ``sphinx-build -W -q docs work_dirs/docs``.

The environment of ser_mm has to be installed, with sphinx, myst-parser and furo: the API pages
come from the docstrings, the command line page from ``ser-mm COMMAND --help``.
"""

import importlib
import io
import os
import pkgutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ser_mm  # noqa: E402
from ser_mm.cli.main import COMMANDS, main  # noqa: E402

# The width of the help texts.
os.environ.update(COLUMNS='88', NO_COLOR='1')

project = 'ser_mm'
author = 'The ser_mm developers'
version = release = ser_mm.__version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'sphinx.ext.viewcode',
]
# Written by the demo; pages include them.
exclude_patterns = ['results/demo/**']
suppress_warnings = ['myst.strikethrough']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

html_theme = 'furo'
html_title = f'ser_mm {version}'

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings have the types
autodoc_default_options = {'members': True, 'special-members': '__call__'}
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Every other name in the docstrings has to be one that is documented here.
nitpicky = True
nitpick_ignore_regex = [
    # Words of "Args:" and types of other packages, which are not linked.
    ('py:class', r'optional|BaseDataPreprocessor|Callable|Config|Counter.*|DataLoader|DataSample'),
    ('py:class', r'Figure|Generator|Iterable|Iterator|Mapping|Optimizer|Path|Sequence|Tensor'),
    ('py:class', r'Compose|Dataset|Image|Runner|_ParamScheduler'),
    ('py:.*', r'(argparse|collections|mmengine|mmpretrain|nn|np|numpy|onnx|pickle|torch)\..*'),
]


class CommandHelps(Directive):
    """A section with the help text of each command of ``ser-mm``."""

    def run(self) -> list[nodes.Node]:
        """Ask the commands themselves."""
        sections = []
        for command in COMMANDS:
            text = io.StringIO()
            with redirect_stdout(text), suppress(SystemExit):
                main([command, '--help'])
            section = nodes.section(ids=[nodes.make_id(command)], names=[command])
            section += nodes.title(text=f'ser-mm {command}')
            section += nodes.literal_block(text=text.getvalue(), language='text')
            sections.append(section)
        return sections


def resolve_public_name(app, env, node, contnode):
    """Link what a package exports to where it is documented: the module that defines it.

    Constants without a docstring are on no page; their names are shown without a link.
    """
    target = node.get('reftarget', '')
    for name in (target, f'{node.get("py:module")}.{target}'):
        module, _, attribute = name.rpartition('.')
        try:
            found = getattr(importlib.import_module(module), attribute)
            if node['reftype'] == 'data':
                return contnode
            home = f'{found.__module__}.{found.__qualname__}'
        except (ImportError, AttributeError, ValueError):
            continue
        domain = env.get_domain('py')
        return domain.resolve_xref(
            env, node['refdoc'], app.builder, node['reftype'], home, node, contnode
        )
    return None


def check_every_module_is_documented(app, env) -> None:
    """Warn of public modules that no API page shows."""
    documented = env.get_domain('py').modules
    for module in pkgutil.walk_packages(ser_mm.__path__, 'ser_mm.'):
        hidden = '._' in module.name or module.name.startswith('ser_mm.cli')
        if not (module.ispkg or hidden or module.name in documented):
            logging.getLogger(__name__).warning('%s is on no page of docs/api', module.name)


def setup(app) -> None:
    """Add what is above to Sphinx."""
    app.add_directive('command-helps', CommandHelps)
    app.connect('missing-reference', resolve_public_name)
    app.connect('env-check-consistency', check_every_module_is_documented)
