"""Run a command of ``ser-mm`` in this process."""

import importlib


def run_command(name, *args):
    """What ``ser-mm name args`` exits with: None, a status, or the sentence that it ends with."""
    module = importlib.import_module(f'ser_mm.cli.{name.replace("-", "_")}')
    try:
        module.main(list(map(str, args)))
    except SystemExit as end:
        return end.code
