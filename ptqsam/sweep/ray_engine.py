"""Engine `ray`: the cells as tasks of a Ray cluster, or of a Ray started on this machine."""

import importlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from ptqsam.errors import ConfigError
from ptqsam.sweep.lock import locked
from ptqsam.sweep.run_cell import Job, Outcome, run_cell
from ptqsam.sweep.spec import Resources

# a task whose node or process was lost is started again so many times; the cell goes on from what lies on disk
RETRIES = 5
# bytes of Ray's store of objects on this machine, about the least that it takes
_STORE = 100_000_000
# seconds for a cluster to answer
_PATIENCE = 10.0
# seconds between looks at whether the sweep is to stop
_GLANCE = 1.0


def run_ray(
    jobs: Sequence[Job], resources: Resources, gpus: int, address: str | None, at_a_time: int | None, stop: Event
) -> Iterator[tuple[Job, Outcome]]:
    """Run cells as Ray tasks. The folder of the sweep, data and checkpoints are the same files on all nodes.

    Args:
        jobs: the cells, in order.
        resources: what a cell takes.
        gpus: GPUs of each.
        address: of the cluster, `auto` or `host:port`; None: start one on this machine.
        at_a_time: cells on a cluster that is started here; None: as many as its cores allow.
        stop: when set, running cells are interrupted and no other is started.

    Yields:
        Each cell and what became of it, as they end.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, or has no node on which a cell fits.
    """
    ray = import_ray()
    threads = resources.threads * resources.processes
    _connect(ray, address, None if at_a_time is None else at_a_time * threads)
    try:
        needs: dict[str, Any] = dict(num_cpus=threads, num_gpus=gpus)
        if resources.memory_gb is not None:
            needs['memory'] = int(resources.memory_gb * 1e9)
        _demand_room(ray, needs)
        # the tool runs in a process of its own, so a lost worker is the machine's fault and not the cell's
        task = ray.remote(max_retries=RETRIES, **needs)(run_task)
        running = {task.remote(job): job for job in jobs}
        while running:
            done, _ = ray.wait(list(running), timeout=_GLANCE)
            if stop.is_set():
                done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for reference in done:
                yield running.pop(reference), _outcome(ray, reference)
            if stop.is_set():
                # all looked at before any is cancelled: that makes room, in which others would begin
                begun = [locked(Path(job.folder)) for job in running.values()]
                for reference in running:
                    ray.cancel(reference)  # raises KeyboardInterrupt in a task that runs
                for job, worked_on in zip(running.values(), begun, strict=True):
                    yield job, Outcome('interrupted', 'interrupted') if worked_on else Outcome('waiting')
                return
    finally:
        ray.shutdown()


def run_task(job: Job) -> Outcome:
    """A cell as a Ray task: Ray has set the GPUs; a cell that another task works on is waited for."""
    return run_cell(job, {}, wait=True)


def import_ray() -> Any:
    """The module ray.

    Raises:
        ConfigError: not installed.
    """
    try:
        return importlib.import_module('ray')
    except ImportError:
        raise ConfigError("--engine ray needs Ray, which is not installed: pip install 'ptqsam[ray]'") from None


def _connect(ray: Any, address: str | None, cores: int | None) -> None:
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # it would tell its makers of each start
    settings: dict[str, Any] = dict(address=address, log_to_driver=False, logging_level='ERROR')
    if address is None:
        # results lie in files: next to nothing is kept in Ray's store
        settings |= dict(address='local', num_cpus=cores, include_dashboard=False, object_store_memory=_STORE)
    try:
        _demand_listener(address)
        ray.init(**settings)
    except (OSError, ValueError, RuntimeError) as error:
        where = 'a Ray cluster here' if address is None else f'the Ray cluster {address}'
        said = ' '.join(str(error).split())[:200]
        raise ConfigError(
            f'--engine ray: {where} cannot be reached ({said}); start one with `ray start --head`, or leave out '
            '--ray-address to use this machine alone'
        ) from None


def _demand_listener(address: str | None) -> None:
    """Fail at once where nobody listens; Ray itself would try for many minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or '').rpartition(':')
    if port.isdigit():
        socket.create_connection((host.removeprefix('ray://'), int(port)), _PATIENCE).close()


def _demand_room(ray: Any, needs: dict[str, Any]) -> None:
    """Refuse cells that fit on no node: Ray would wait for one for ever."""
    names = {'num_cpus': 'CPU', 'num_gpus': 'GPU', 'memory': 'memory'}
    nodes = [node['Resources'] for node in ray.nodes() if node['Alive']]
    if not any(all(node.get(names[what], 0) >= amount for what, amount in needs.items()) for node in nodes):
        wanted = ', '.join(f'{amount} {names[what]}' for what, amount in needs.items() if amount)
        raise ConfigError(f'--engine ray: no node has what a cell takes ({wanted}); lower `resources` of the sweep')


def _outcome(ray: Any, reference: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
        return outcome
    except ray.exceptions.RayError as error:
        said = ' '.join(str(error).split())[:200]
        own = (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError)
        if isinstance(error, own):  # a node lacks something, for example this project
            return Outcome('failed', f'error: Ray: {said}')
        return Outcome('interrupted', f'error: Ray lost the cell {RETRIES + 1} times ({said})')
