"""One cell: lock its folder, run `tools/test_quant.py` there, note in the ledger what became of it."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from ptqsam.errors import PTQSAMError
from ptqsam.fileio import write_json
from ptqsam.sweep.ledger import Ledger, Status, noted
from ptqsam.sweep.lock import CONSOLE, lock
from ptqsam.sweep.records import read_result
from ptqsam.tool_process import GRACE, INTERRUPTED, output_since, reason, run_tool

TOOL = ('-m', 'ptqsam')


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

    As long as a process works on it, no other one does (`lock`); a tool whose starter is gone ends as if interrupted.

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
        with lock(folder, stop, wait) as console:
            if console is None:
                return Outcome('busy')
            ledger: Ledger | None = noted(lambda: Ledger(Path(job.sweep)))
            if (result := read_result(folder)) is not None:
                if ledger:
                    noted(partial(ledger.settle, job.key, 'done', metrics=result['metrics']))
                return Outcome('done', metrics=result['metrics'])
            if ledger and (error := noted(lambda: failed_since(ledger, job))):
                return Outcome('failed', error)
            attempt = noted(lambda: ledger.start(job.key, socket.gethostname(), os.getpid())) if ledger else None
            status: Status = 'interrupted'
            error, metrics = 'interrupted', None
            try:
                write_json(folder / 'cell.json', dict(key=job.key, name=job.name, words=job.words))
                status, error = _run_tool(job, folder, env, stop, console)
                if (result := read_result(folder)) is not None:
                    # the result is there, whatever came after it: what went wrong then is told
                    status, metrics, error = 'done', result['metrics'], error if status == 'failed' else ''
            except (PTQSAMError, OSError) as problem:
                status, error = 'failed', _said(problem, folder)
            finally:
                if ledger and attempt is not None:
                    noted(lambda: ledger.finish(job.key, attempt, status, error, metrics))
            return Outcome(status, error, time.monotonic() - start, status == 'done', metrics)
    except (PTQSAMError, OSError) as problem:
        return Outcome('failed', _said(problem, folder))


def _said(problem: PTQSAMError | OSError, folder: Path) -> str:
    """An error of ours in one line."""
    if isinstance(problem, PTQSAMError):
        return f'error: {problem}'
    return f'error: {problem.filename or folder}: {problem.strerror}'


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


def _run_tool(job: Job, folder: Path, env: Mapping[str, str], stop: Event | None, console: int) -> tuple[Status, str]:
    """Run the tool to its end, its output in a file.

    Returns:
        Status by its exit code, and what went wrong in one line.
    """
    begin = os.fstat(console).st_size
    # torchrun gives its processes as long as we give a tool, and has to end itself after that
    grace = GRACE if job.processes == 1 else 2 * GRACE
    code = run_tool(command(job), console, job.threads, {**job.env, **env}, job.cwd, stop, grace)
    if code == 0:
        # without a result the tool itself is at fault
        return 'failed', f'error: the tool ended without a result; see {folder / CONSOLE}'
    if code == INTERRUPTED or (stop and stop.is_set()):
        return 'interrupted', 'interrupted'
    if code > 0 and job.processes > 1 and (signalled := _signal_of_process(folder / CONSOLE, begin)):
        code = -signalled
    if code < 0:
        # a crash would come again; one who kills, or the lack of memory, may be gone
        return 'interrupted' if -code in (signal.SIGKILL, signal.SIGTERM) else 'failed', _killed(-code)
    return 'failed', reason(folder / CONSOLE, begin, code)


def _signal_of_process(console: Path, begin: int) -> int | None:
    """Signal that ended the first of torchrun's processes to fail; None if none did."""
    cause = output_since(console, begin).rpartition('Root Cause (first observed failure):')[2]
    number = re.search(r'^ *exitcode *: -(\d+)', cause, re.MULTILINE)
    return int(number[1]) if number else None


def _killed(number: int) -> str:
    name = signal.Signals(number).name
    memory = '; the system may have run out of memory: fewer --jobs, or a smaller recipe' if name == 'SIGKILL' else ''
    return f'error: killed by {name}{memory}'
