"""A sweep of tiny cells, its command, and what is known of its results without the ledger."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import ROOT, accept_interrupts

Stamp = tuple[int, int]


def write_sweep(folder: Path, tiny: Path, axes: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a sweep of the tiny pipeline; by default two cells, 4 and 6 bits. None takes an axis out."""
    path = folder / 'grid.yaml'
    usual = {'model': str(tiny / 'tiny.py'), 'recipe': str(tiny / 'recipe.yaml'), 'bits': ['w4a4', 'w6a6']}
    wanted = {axis: values for axis, values in (usual | (axes or {})).items() if values is not None}
    path.write_text(yaml.safe_dump({'axes': wanted, **settings}, sort_keys=False))
    return path


def command(*args: object) -> dict[str, Any]:
    """Command and environment of `tools/sweep.py`, for `subprocess`."""
    words = [sys.executable, str(ROOT / 'tools' / 'sweep.py'), *map(str, args)]
    return dict(args=words, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True)


def run_sweep_tool(*args: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run `tools/sweep.py` in a subprocess."""
    return subprocess.run(**command(*args), cwd=cwd, capture_output=True, timeout=600)


def start_sweep_tool(*args: object, cwd: Path) -> subprocess.Popen:
    """Start `tools/sweep.py`, which can be interrupted and killed."""
    return subprocess.Popen(
        **command(*args), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=accept_interrupts
    )


def results(folder: Path) -> dict[str, Stamp]:
    """Cell -> inode and time of its result: the same as long as the result was made once."""
    found = {}
    for path in folder.glob('cells/**/result.json'):
        status = path.stat()
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found


def tools_of(folder: Path) -> list[int]:
    """Processes that work on cells of a sweep: their command names its folder."""
    own = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            words = path.read_bytes().split(b'\0')
        except OSError:
            continue
        if b'ptqsam' in words and any(str(folder).encode() in word for word in words):
            own.append(int(path.parent.name))
    return own


def kill(number: int) -> None:
    """kill -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding='utf-8'))
