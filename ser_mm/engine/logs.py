"""Reading what MMEngine logged of a run, and telling how far work is."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

SECONDS = 15
"""Between two lines of progress."""

T = TypeVar('T')


def read_scalars(work_dir: str | Path) -> list[dict]:
    """What MMEngine logged of a run, in order of the iterations.

    A run that was resumed has one log per start; where they overlap, the last one counts.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per logged iteration: ``step``, ``loss``, ``lr``, ``time``, ...
    """
    records = {r['step']: r for r in read_records(work_dir) if 'loss' in r and 'step' in r}
    return [records[step] for step in sorted(records)]


def read_records(work_dir: str | Path) -> list[dict]:
    """All that MMEngine logged of a run, as it was written.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        list[dict]: One record per line that is whole.
    """
    records = []
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in file.read_text(errors='replace').splitlines():
            with suppress(json.JSONDecodeError):  # the run was killed, or just now writes the line
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def tell_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass items on, and print a line every 15 seconds: how many there were, and the time left.

    Args:
        items (Iterable): What is worked on, one after the other.
        total (int): How many there are.
        what (str): What they are, as the line says.

    Yields:
        The items.
    """
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said > SECONDS:
            said, left = now, (now - start) / done * (total - done)
            print(f'[{now - start:4.0f} s] {what} {done}/{total}, {left:.0f} s left', flush=True)
        yield item
