"""One progress bar for all long work, with ETA, on stderr."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar('T')


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Iterate with a progress bar.

    Args:
        items: what to iterate over.
        what: the work, for example 'calibrate'.
        unit: what one item is, for example 'image'.
        total: number of items where ``items`` has no length.

    Returns:
        An iterable over ``items``.
    """
    return tqdm(items, desc=what, unit=f' {unit}', total=total, file=sys.stderr, mininterval=_interval())


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar that is moved by hand: a context manager with `update(n)` and `set_postfix_str(text)`.

    Args:
        total: number of items.
        what: the work, for example 'reconstruct'.
        unit: what one item is, for example 'iteration'.
    """
    return tqdm(desc=what, unit=f' {unit}', total=total, file=sys.stderr, mininterval=_interval())


def _interval() -> float:
    """Seconds between updates: a log file gets a line every half minute, a terminal a living bar."""
    return 0.2 if sys.stderr.isatty() else 30.0
