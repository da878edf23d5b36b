"""One progress bar for all long work, with ETA, on stderr."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from mmengine.dist import is_main_process
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
    return tqdm(items, desc=what, unit=f' {unit}', total=total, **_settings())


def progress_bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar that is moved by hand: a context manager with `update(n)` and `set_postfix_str(text)`.

    Args:
        total: number of items.
        what: the work, for example 'reconstruct'.
        unit: what one item is, for example 'iteration'.
    """
    return tqdm(desc=what, unit=f' {unit}', total=total, **_settings())


def _settings() -> dict[str, Any]:
    """One bar for all processes; a log file gets a line every half minute, a terminal a living bar."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return dict(file=sys.stderr, mininterval=interval, disable=not is_main_process())
