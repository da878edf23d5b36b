"""A tool of this project in a process of its own: started, interrupted with a grace time, and why it failed."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

INTERRUPTED = 130
# seconds that an interrupted tool has to end by itself
GRACE = 30.0
# seconds between looks at a process
GLANCE = 0.2
# what may stand before the tool's own line: another process's unfinished progress bar
_ERROR = re.compile(r'(?:^|[^A-Za-z\s] ?)error: (.*)', re.MULTILINE)


def run_tool(
    command: Sequence[str],
    console: int,
    threads: int,
    env: Mapping[str, str],
    cwd: str | None = None,
    stop: Event | None = None,
    grace: float = GRACE,
) -> int:
    """Run a tool to its end. When this process is gone, the tool ends as if interrupted (`PTQSAM_PARENT`).

    Args:
        command: how it is started.
        console: descriptor of the file that its output goes to.
        threads: CPU threads.
        env: environment variables in addition to those of this process.
        cwd: folder in which it runs; None: the current one.
        stop: when set, the tool is interrupted, as it is by Ctrl-C.
        grace: seconds that it has to end then, before it is killed.

    Returns:
        Exit code; negative: the signal that ended it.
    """
    counts = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(threads))
    own = dict(PYTHONUNBUFFERED='1', PTQSAM_PARENT=str(os.getpid()), **counts)
    tool = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={**os.environ, **own, **env},
        # Ctrl-C in a terminal reaches this process alone, which passes it on once
        process_group=0,
    )
    try:
        while stop is None or not stop.is_set():
            try:
                return tool.wait(GLANCE)
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        _interrupt(tool, grace)
        raise
    return _interrupt(tool, grace)


def _interrupt(tool: subprocess.Popen, grace: float) -> int:
    tool.send_signal(signal.SIGINT)
    try:
        return tool.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(tool.pid, signal.SIGKILL)
        return tool.wait()


def reason(console: Path, begin: int, code: int) -> str:
    """What went wrong in one line: the tool's own, or else the last one.

    Args:
        console: what a tool has written.
        begin: bytes before what the last call wrote.
        code: its exit code.
    """
    text = output_since(console, begin)
    if lines := _ERROR.findall(text):
        return f'error: {lines[-1].strip()}'
    # torchrun's report comes after the words of the process that failed
    text = text.split('torch/distributed/elastic/multiprocessing/api.py')[0]
    said = [line.strip() for line in text.split('\n') if line.strip()]
    return f'exit code {code}' + (f': {said[-1]}' if said else '')


def output_since(console: Path, begin: int) -> str:
    """What was written to a file behind so many bytes; progress bars are lines."""
    with open(console, 'rb') as file:
        file.seek(begin)
        return file.read().decode(errors='replace').replace('\r', '\n')
