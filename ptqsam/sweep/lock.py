"""Which process works on a cell: the one that holds the lock of the file that the tool's output goes to.

Whoever writes there holds it: the process that starts the tool, the tool, the processes that torchrun starts for it. So
it holds as long as one of them lives.
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from ptqsam.tool_process import GLANCE

CONSOLE = 'console.txt'


def locked(folder: Path) -> bool:
    """Whether a process works on the cell in a folder."""
    try:
        with open(folder / CONSOLE, 'r+b') as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who looks at the same time is no worker
    except BlockingIOError:
        return True
    except OSError:  # nobody has begun, or nobody can
        return False
    return False


@contextmanager
def lock(folder: Path, stop: Event | None, wait: bool) -> Iterator[int | None]:
    """Hold the lock of a cell.

    Args:
        folder: of the cell.
        stop: when set, no longer waits.
        wait: for another process that holds it.

    Yields:
        Descriptor to write the tool's output to; None if another process holds the lock.
    """
    path, said = folder / CONSOLE, False
    console = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        while True:
            try:
                fcntl.flock(console, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait or (stop and stop.is_set()):
                    yield None
                    return
                if not said:
                    print(f'{folder}: waiting for another process that works on it', file=sys.stderr, flush=True)
                    said = True
                time.sleep(GLANCE)
                continue
            yield console
            return
    finally:
        os.close(console)
