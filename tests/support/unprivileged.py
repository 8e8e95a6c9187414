"""Act as a user whom permissions bind, as they do not bind root."""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NOBODY = 65534


@contextmanager
def unprivileged():
    """A folder, and while the context lasts this process is a user other than root there."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        if not all(os.access(x, os.R_OK | os.X_OK, effective_ids=True) for x in (folder, ROOT)):
            pytest.skip(f'{folder} or {ROOT} is closed to others than root')
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for place, _, _ in os.walk(folder):
            os.chmod(place, 0o700)
        shutil.rmtree(folder)
