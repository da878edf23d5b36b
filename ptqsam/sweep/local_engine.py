"""Engine `local`: processes on this machine, so many at a time, one per GPU."""

import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import torch

from ptqsam.sweep.run_cell import Job, Outcome, run_cell


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    if named is not None:
        return [name for name in named.split(',') if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def run_local(jobs: Sequence[Job], at_a_time: int, gpus: int, stop: Event) -> Iterator[tuple[Job, Outcome]]:
    """Run cells in processes of this machine.

    Args:
        jobs: the cells, in order.
        at_a_time: cells that run at a time.
        gpus: GPUs of each; cells that run at a time have different ones as far as there are enough.
        stop: when set, running cells are interrupted and no other is started.

    Yields:
        Each cell and what became of it, as they end; `waiting`: it was not begun. Those that another process works on
        come last, when that one has ended.
    """
    names = visible_gpus() if gpus else []
    slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in range(at_a_time):
        own = [names[(slot * gpus + i) % len(names)] for i in range(gpus)] if names else []
        slots.put({'CUDA_VISIBLE_DEVICES': ','.join(own)})
    ended: queue.SimpleQueue[tuple[Job, Outcome]] = queue.SimpleQueue()

    def work(job: Job, wait: bool) -> None:
        if stop.is_set():
            ended.put((job, Outcome('waiting')))
            return
        slot = slots.get()
        try:
            ended.put((job, run_cell(job, slot, stop, wait)))
        except BaseException as error:  # else the driver would wait for this cell for ever
            ended.put((job, Outcome('failed', f'error: {type(error).__name__}: {error}')))
            raise
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            todo, wait = list(jobs), False
            while todo:
                for job in todo:
                    pool.submit(work, job, wait)
                busy = []
                for _ in range(len(todo)):
                    job, outcome = ended.get()
                    if outcome.status == 'busy' and not stop.is_set():
                        busy.append(job)
                    else:
                        yield job, outcome
                todo, wait = busy, True
        except BaseException:
            stop.set()  # the pool waits for its threads, and they for what they run
            raise
