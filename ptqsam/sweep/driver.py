"""The driver: plan the cells, see what is done, let an engine run the rest, tell how it ended."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from ptqsam.errors import AssetError
from ptqsam.fileio import folder_lock
from ptqsam.progress import progress_bar
from ptqsam.sweep.cells import Cell
from ptqsam.sweep.ledger import LEDGER, Ledger, Row
from ptqsam.sweep.lock import locked
from ptqsam.sweep.records import read_result
from ptqsam.sweep.run_cell import Job, Outcome
from ptqsam.sweep.spec import Resources

# what a run on another machine has to know of this one's environment
_PLACES = ('PTQSAM_', 'WANDB_')
METRIC = 'segm_mAP'

Engine = Callable[[Sequence[Job], Event], Iterator[tuple[Job, Outcome]]]


@dataclass
class Summary:
    """How a sweep ended.

    Attributes:
        found: cells that were done before.
        computed: names of cells that this call has finished.
        failed: name -> error, of cells that failed now or earlier.
        interrupted: name -> how, of cells that were begun, or killed.
        waiting: cells that were not begun when the sweep was stopped.
        stopped: the sweep was, by Ctrl-C or SIGTERM.
    """

    found: int = 0
    computed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: dict[str, str] = field(default_factory=dict)
    waiting: int = 0
    stopped: bool = False


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a sweep; a damaged one is put aside, and a new one begun that takes in what is finished."""
    with suppress(AssetError):
        return Ledger(folder)
    with folder_lock(folder, 'sweep'):
        try:
            return Ledger(folder)  # another driver may have put it aside
        except AssetError as error:
            aside = folder / f'{LEDGER}.damaged-{time.time_ns()}'
            (folder / LEDGER).rename(aside)
            print(f'warning: {error}; done: it is {aside} now', file=sys.stderr, flush=True)
            return Ledger(folder)


def make_job(cell: Cell, folder: Path, resources: Resources, further: Iterable[str] = ()) -> Job:
    """What is run for a cell.

    Args:
        cell: the cell.
        folder: of the sweep.
        resources: what a cell takes.
        further: words of the command that do not change the result.
    """
    place = (folder / 'cells' / cell.folder).absolute()
    return Job(
        sweep=str(folder.absolute()),
        key=cell.key,
        name=cell.name,
        folder=str(place),
        words=(*cell.words(place), '--resume', *further),
        processes=resources.processes,
        threads=resources.threads,
        cwd=os.getcwd(),
        env={name: value for name, value in os.environ.items() if name.startswith(_PLACES)},
        planned=time.time(),
    )


def plan(folder: Path, cells: Sequence[Cell]) -> list[Row]:
    """Enter the cells into the ledger of a sweep, and what their folders say of them.

    Args:
        folder: of the sweep.
        cells: all its cells.

    Returns:
        Their rows. One that says `running` is worked on by another process.
    """
    ledger = open_ledger(folder)
    ledger.plan([(cell.key, cell.name, cell.plain()) for cell in cells])
    for row in ledger.rows():
        place = folder / 'cells' / row.spec['folder']
        try:
            result = read_result(place)
        except AssetError as error:
            ledger.settle(row.key, 'interrupted', f'error: {error}')  # told again until somebody removes it
            continue
        if result is not None:
            if row.status != 'done':
                ledger.settle(row.key, 'done', metrics=result['metrics'])
        elif row.status == 'done':  # somebody has removed the result
            ledger.settle(row.key, 'pending')
        elif row.status == 'running' and not locked(place):
            ledger.settle(row.key, 'interrupted', 'interrupted: its process is gone', was='running')
    return ledger.rows([cell.key for cell in cells])


def run_sweep(jobs: Sequence[Job], rows: Sequence[Row], engine: Engine, retry_failed: bool) -> Summary:
    """Run the cells that are not done.

    Args:
        jobs: what is run for each cell.
        rows: the cells in the ledger, from `plan`, in the same order.
        engine: runs them.
        retry_failed: also those that failed in an earlier call; those that were interrupted or killed always go on.

    Returns:
        How it ended; finished cells and errors have been told on stderr.
    """
    summary, todo = Summary(), []
    for job, row in zip(jobs, rows, strict=True):
        if row.status == 'done':
            summary.found += 1
        elif row.status == 'failed' and not retry_failed:
            summary.failed[job.name] = row.error
        else:
            todo.append(job)
    if not todo:
        return summary
    with _stoppable() as stop, progress_bar(len(todo), 'sweep', 'cell') as bar:
        for job, outcome in engine(todo, stop):
            if outcome.status == 'done':
                summary.computed += [job.name] if outcome.computed else []
                summary.found += not outcome.computed
            elif outcome.status == 'failed':
                summary.failed[job.name] = outcome.error
            elif outcome.status == 'interrupted':
                summary.interrupted[job.name] = outcome.error
            else:
                summary.waiting += 1
            if not stop.is_set() or outcome.status in ('done', 'failed'):
                bar.update()
                bar.write(f'{job.name}: {_told(outcome)}', file=sys.stderr)
        summary.stopped = stop.is_set()
    return summary


def _told(outcome: Outcome) -> str:
    """What a finished cell came to, for people."""
    if outcome.status != 'done':
        return outcome.error
    if outcome.metrics is None:
        return 'done'
    made = f'in {outcome.seconds:.0f} s' if outcome.computed else 'done by another process'
    warning = f'; {outcome.error}' if outcome.error else ''
    return f'{_metric(outcome.metrics["quant"])}{_against(outcome.metrics["fp"])}, {made}{warning}'


def _metric(metrics: dict[str, Any]) -> str:
    return f'{METRIC} {metrics[METRIC]:.3f}' if METRIC in metrics else str(metrics)


def _against(metrics: dict[str, Any] | None) -> str:
    return f' (FP {metrics[METRIC]:.3f})' if metrics and METRIC in metrics else ''


@contextmanager
def _stoppable() -> Iterator[Event]:
    """An event that Ctrl-C and SIGTERM set in place of raising: cells have seconds to end, then they are killed."""
    stop = Event()

    def ask(number: int, frame: Any) -> None:
        if not stop.is_set():
            print('\nstopping: running cells end where they can go on later', file=sys.stderr)
        stop.set()

    earlier = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
