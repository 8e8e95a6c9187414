"""Lets the scripts here run from a checkout that is not installed, before an installed copy."""

import sys
from pathlib import Path

_root = Path(__file__).resolve().parents[1]
if (_root / 'ser_mm').is_dir():
    sys.path.insert(0, str(_root))
