"""The shipped configs, in a checkout and in an installed package."""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / '.mim' / 'configs'

CONFIG_ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / 'configs'
"""Folder of the shipped configs."""


def shipped_configs() -> dict[str, Path]:
    """The shipped configs that can be named in place of a path, in alphabetical order.

    Returns:
        dict[str, Path]: Files by their path in :data:`CONFIG_ROOT` without '.py', as in
        'demo/ser_mocov3'. What configs inherit from (``_base_``) is left out.
    """
    files = sorted(CONFIG_ROOT.rglob('*.py'))
    names = [file.relative_to(CONFIG_ROOT).with_suffix('') for file in files]
    return {
        name.as_posix(): file
        for name, file in zip(names, files, strict=True)
        if '_base_' not in name.parts
    }


def find_config(name: str | Path) -> Path:
    """The file of a config that is given by its path or by the name of a shipped config.

    Args:
        name (str | Path): Path of a file; or path of a shipped config in :data:`CONFIG_ROOT`, or
            its file name if no other has the same, both with or without '.py'. A leading
            'configs/' is passed over, so that a path in a checkout is found from anywhere.

    Returns:
        Path: The file.

    Raises:
        FileNotFoundError: If there is no such file and no such config, with the closest names.

    Example:
        >>> find_config('ser_mocov3_vits16').name
        'ser_mocov3_vits16.py'
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_configs()
    wanted = Path(name).as_posix().removesuffix('.py').removeprefix('configs/')
    found = [key for key in known if wanted in (key, key.rpartition('/')[2])]
    if len(found) == 1 or wanted in found:
        return known[wanted if wanted in found else found[0]]
    if found:
        remedy = f'it is the name of {len(found)} shipped configs; choose {" or ".join(found)}'
    else:
        ends = {key.rpartition('/')[2]: key for key in known}
        close = difflib.get_close_matches(wanted.rpartition('/')[2], ends, n=3, cutoff=0.5)
        near = [ends[key] for key in close] or list(known)[:3]
        remedy = f'neither a file nor the name of a shipped config; close to it: {", ".join(near)}'
    raise FileNotFoundError(f'config {str(name)!r}: {remedy}.')


def is_config(text: str) -> bool:
    """Whether an argument that may be a config or a checkpoint is a config.

    Args:
        text (str): Path or name.
    """
    if text.endswith('.py'):
        return True
    return not Path(text).exists() and any(
        text in (key, key.rpartition('/')[2]) for key in shipped_configs()
    )
