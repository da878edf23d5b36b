"""One cell: lock its folder, run `tools/test_quant.py` there, note in the ledger what became of it."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from ptqsam.errors import PTQSAMError
from ptqsam.fileio import write_json
from ptqsam.sweep.ledger import Ledger, Status, noted
from ptqsam.sweep.records import read_result

TOOL = ('-m', 'ptqsam')
CONSOLE = 'console.txt'
INTERRUPTED = 130
# seconds between looks at a process, or at a lock that another one holds
_GLANCE = 0.2
# seconds that an interrupted run has to end by itself
_GRACE = 30.0
# what may stand before the tool's own line: another process's unfinished progress bar
_ERROR = re.compile(r'(?:^|[^A-Za-z\s] ?)error: (.*)', re.MULTILINE)


@dataclass(frozen=True)
class Job:
    """What is to be run for a cell; plain values, so that it can be sent to another machine.

    Attributes:
        sweep: folder of the sweep.
        key: of the cell.
        name: of the cell.
        folder: work dir of the cell.
        words: arguments of `tools/test_quant.py`.
        processes: that work on it together.
        threads: CPU threads of each.
        cwd: folder in which the command is run; paths in it are relative to there.
        env: environment variables that say where things are.
        planned: when it was, seconds since 1970.
    """

    sweep: str
    key: str
    name: str
    folder: str
    words: tuple[str, ...]
    processes: int
    threads: int
    cwd: str
    env: dict[str, str]
    planned: float


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        status: 'done', 'failed', 'interrupted', 'busy' (another process works on it) or 'waiting' (the sweep was
            stopped before).
        error: one line, '' if there is none.
        seconds: wall time of this attempt.
        computed: whether this attempt made the result, rather than found it.
        metrics: as in `result.json`, None if there is none.
    """

    status: str
    error: str = ''
    seconds: float = 0.0
    computed: bool = False
    metrics: dict[str, Any] | None = None


def run_cell(job: Job, env: Mapping[str, str], stop: Event | None = None, wait: bool = False) -> Outcome:
    """Run a cell unless it is done, or another process works on it.

    The lock is inherited by the tool, so it holds as long as one of the two lives, and no cell is computed twice at a
    time. A tool whose starter is gone (`PTQSAM_PARENT`) ends as if interrupted.

    Args:
        job: the cell.
        env: environment variables in addition to those of this process.
        stop: when set, the run is interrupted.
        wait: wait for another process that works on it, then take its result or go on from where it stopped.

    Returns:
        What became of it. Whatever goes wrong is an outcome, not an exception.
    """
    folder, start = Path(job.folder), time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / '.lock', stop, wait) as lock:
            if lock is None:
                return Outcome('busy')
            ledger: Ledger | None = noted(lambda: Ledger(Path(job.sweep)))
            if (result := read_result(folder)) is not None:
                if ledger:
                    noted(partial(ledger.settle, job.key, 'done', metrics=result['metrics']))
                return Outcome('done', metrics=result['metrics'])
            if ledger and (error := noted(lambda: failed_since(ledger, job))):
                return Outcome('failed', error)
            attempt = noted(lambda: ledger.start(job.key, socket.gethostname(), os.getpid())) if ledger else None
            metrics = None
            try:
                write_json(folder / 'cell.json', dict(key=job.key, name=job.name, words=job.words))
                status, error = _run_tool(job, folder, env, stop, lock)
                if (result := read_result(folder)) is not None:
                    # the result is there, whatever came after it: what went wrong then is told
                    status, metrics, error = 'done', result['metrics'], error if status == 'failed' else ''
            except OSError as problem:
                status, error = 'failed', f'error: {problem.filename or folder}: {problem.strerror}'
            if ledger and attempt is not None:
                noted(lambda: ledger.finish(job.key, attempt, status, error, metrics))
            return Outcome(status, error, time.monotonic() - start, status == 'done', metrics)
    except PTQSAMError as problem:
        return Outcome('failed', f'error: {problem}')
    except OSError as problem:  # the folder cannot be made
        return Outcome('failed', f'error: {problem.filename or folder}: {problem.strerror}')


def failed_since(ledger: Ledger, job: Job) -> str:
    """Error of a cell that another driver has seen fail since this one planned it; '' if none has."""
    attempts = ledger.attempts(job.key)
    last = attempts[-1] if attempts else None
    return last['error'] if last and last['status'] == 'failed' and last['ended'] > job.planned else ''


def command(job: Job) -> list[str]:
    """The command that computes a cell, as a process is started with it."""
    if job.processes == 1:
        return [sys.executable, *TOOL, *job.words]
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={job.processes}']
    return [sys.executable, *launcher, *TOOL, *job.words, '--launcher', 'pytorch']


def locked(folder: Path) -> bool:
    """Whether a process works on the cell in a folder."""
    try:
        with open(folder / '.lock', 'r+b') as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who looks at the same time is no worker
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _locked(path: Path, stop: Event | None, wait: bool) -> Iterator[int | None]:
    """Hold a lock file; yields its descriptor, None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait and not (stop and stop.is_set()):
                    time.sleep(_GLANCE)
                    continue
                yield None
                return
            yield lock
            return
    finally:
        os.close(lock)


def _run_tool(job: Job, folder: Path, env: Mapping[str, str], stop: Event | None, lock: int) -> tuple[Status, str]:
    """Run the tool to its end, its output in a file.

    Returns:
        Status by its exit code, and what went wrong in one line.
    """
    threads = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(job.threads))
    own = dict(PYTHONUNBUFFERED='1', PTQSAM_PARENT=str(os.getpid()), **threads)
    with open(folder / CONSOLE, 'ab') as console:
        begin = console.tell()
        tool = subprocess.Popen(
            command(job),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            cwd=job.cwd,
            env={**os.environ, **job.env, **own, **env},
            pass_fds=(lock,),
            # Ctrl-C in a terminal reaches the driver alone, which passes it on once
            process_group=0,
        )
        code = _wait(tool, stop)
    if code == 0:
        # without a result the tool itself is at fault
        return 'failed', f'error: the tool ended without a result; see {folder / CONSOLE}'
    if code == INTERRUPTED or (stop and stop.is_set()):
        return 'interrupted', 'interrupted'
    if code < 0:
        # a crash would come again; one who kills, or the lack of memory, may be gone
        return 'interrupted' if -code in (signal.SIGKILL, signal.SIGTERM) else 'failed', _killed(-code)
    return 'failed', reason(folder / CONSOLE, begin, code)


def _wait(tool: subprocess.Popen, stop: Event | None) -> int:
    """Exit code of a process, which is interrupted when `stop` is set, or this one is."""
    try:
        while stop is None or not stop.is_set():
            try:
                return tool.wait(_GLANCE)
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        _interrupt(tool)
        raise
    return _interrupt(tool)


def _interrupt(tool: subprocess.Popen) -> int:
    tool.send_signal(signal.SIGINT)
    try:
        return tool.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(tool.pid, signal.SIGKILL)
        return tool.wait()


def _killed(number: int) -> str:
    name = signal.Signals(number).name
    memory = '; the system may have run out of memory: fewer --jobs, or a smaller recipe' if name == 'SIGKILL' else ''
    return f'error: killed by {name}{memory}'


def reason(console: Path, begin: int, code: int) -> str:
    """What went wrong in one line: the tool's own, or else the last one.

    Args:
        console: what a run has written.
        begin: bytes before what the last attempt wrote.
        code: its exit code.
    """
    with open(console, 'rb') as file:
        file.seek(begin)
        text = file.read().decode(errors='replace').replace('\r', '\n')
    if lines := _ERROR.findall(text):
        return f'error: {lines[-1].strip()}'
    # torchrun's report comes after the words of the process that failed
    text = text.split('torch/distributed/elastic/multiprocessing/api.py')[0]
    said = [line.strip() for line in text.split('\n') if line.strip()]
    return f'exit code {code}' + (f': {said[-1]}' if said else '')
