"""Telling how far work is."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SECONDS = 15
"""Between two lines of progress."""

T = TypeVar('T')


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
