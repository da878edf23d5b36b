"""Joining the processes that torchrun or srun started; one that fails stops all of them, with its own words.

Collectives run over gloo, on a GPU machine as well: what is exchanged are statistics, boxes and results, once a stage,
and no gradients. The first process that fails leaves its line in the store that the processes share; a thread of every
other one looks there each second, so that none waits for ever for an answer that will not come.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from ptqsam.errors import ConfigError

# how long the processes wait for each other at the start; and later, when one may reconstruct for a day
JOIN = timedelta(minutes=10)
PATIENCE = timedelta(days=30)
# seconds between two looks for a failure; seconds that a failure gets to become known
LOOK_EVERY, LINGER = 1.0, 10.0
_KEY, _HEARD = 'ptqsam/failure', 'ptqsam/heard'
_LOST = (
    'another process ended without a word (killed, or out of memory?); look at its output, then run again with --resume'
)
# where gloo finds that a peer is gone
_GONE = 'gloo/transport'


@dataclass(frozen=True)
class Failure:
    """What ended a process.

    Attributes:
        rank: the process.
        line: for people.
        exit_code: of the process, and of those that stop because of it.
    """

    rank: int
    line: str
    exit_code: int


@contextmanager
def together(launcher: str) -> Iterator[None]:
    """Run with the other processes of a launcher.

    Args:
        launcher: 'none', 'pytorch' (torchrun) or 'slurm' (srun).

    Raises:
        ConfigError: not started by that launcher, or by torchrun without any; the others do not come; or fewer GPUs
            than processes.
    """
    if launcher == 'none':
        if 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise ConfigError(
                f'torchrun started {os.environ["WORLD_SIZE"]} processes, but each would do the whole run; add '
                '--launcher pytorch'
            )
        yield
        return
    {'pytorch': _check_torchrun, 'slurm': _follow_slurm}[launcher]()
    _choose_gpu(launcher)
    try:
        store, rank, world_size = next(dist.rendezvous('env://', timeout=JOIN))
        dist.init_process_group('gloo', store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # those of torch.distributed are RuntimeErrors
        reason = ' '.join(str(error).split())[:200]
        raise ConfigError(
            f'--launcher {launcher}: the processes did not find each other ({reason}); start all of '
            f'them, and set MASTER_PORT to a port that is free'
        ) from None
    global _watch
    _watch = _Watch(store, rank, world_size)
    yield
    dist.barrier()  # while others work, they may fail
    _watch.stop()
    dist.barrier()  # the store goes with the process that holds it
    dist.destroy_process_group()
    _watch = None


def report_failure(line: str, exit_code: int) -> int:
    """Print the line of a failure, unless another process has said the same, and tell the other processes.

    Args:
        line: one line for people, beginning with 'error: ' or the like.
        exit_code: of this process, if it is the first that fails.

    Returns:
        Exit code of this process: that of the first failure.
    """
    if _watch is None:
        print(line, file=sys.stderr)
        return exit_code
    return _watch.fail(line, exit_code)


def tell_others(line: str) -> None:
    """Let the other processes stop because of a defect that shows its traceback here."""
    if _watch is not None:
        _watch.fail(line, 1)


def lost_others(error: BaseException) -> bool:
    """Whether an exception is what becomes of a process when another one has ended."""
    gone = isinstance(error, dist.DistNetworkError | dist.DistStoreError) or _GONE in str(error)
    return _watch is not None and isinstance(error, RuntimeError) and gone


def report_lost(error: BaseException) -> int:
    """Stop because another process has ended; with its words, if it left any in time.

    Args:
        error: what came of it here.
    """
    assert _watch is not None
    _watch.wait_for_failure()
    return _watch.fail(f'error: {_LOST} ({" ".join(str(error).split())[:200]})', 1)


class _Watch:
    """Tells the others of a failure here, and stops this process when one of the others fails.

    Args:
        store: shared by all processes.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        # a connection of its own: the other one may be waiting for an answer
        self.own: dist.Store = store.clone()  # type: ignore[attr-defined]
        self.lock = threading.Lock()  # held by who ends this process
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self.over.set()
        self.thread.join()

    def fail(self, line: str, exit_code: int) -> int:
        """See `report_failure`."""
        self.lock.acquire()  # for good: from here on, the thread keeps still
        self.over.set()
        mine = Failure(self.rank, line, exit_code)
        try:
            text = self.store.compare_set(_KEY, '', json.dumps(asdict(mine)))
            first = Failure(**json.loads(text))
        except RuntimeError:  # the store went with the process that held it
            first = mine
        if first.rank == self.rank:
            _print(line)
            self._linger()
        else:
            self._say(first, line)
        return first.exit_code

    def wait_for_failure(self) -> None:
        """Give the first failure time to become known."""
        deadline = time.monotonic() + LINGER
        with suppress(RuntimeError):
            while time.monotonic() < deadline and not self.store.check([_KEY]):
                time.sleep(0.1)

    def _look(self) -> None:
        while not self.over.wait(LOOK_EVERY):
            try:
                first = Failure(**json.loads(self.own.get(_KEY))) if self.own.check([_KEY]) else None
            except RuntimeError:
                first = Failure(0, f'error: {_LOST}', 1)
            if first is not None and first.rank != self.rank and self.lock.acquire(blocking=False):
                self._say(first)
                time.sleep(LOOK_EVERY)  # the store may lie here, where the first one looks who has heard
                # the main thread may hang in a collective for ever; every file appears at once or not at all
                os._exit(first.exit_code)

    def _say(self, first: Failure, own: str = '') -> None:
        """Say why this process stops; what all find out for themselves, as a wrong option, one says for all."""
        if first.line != own:
            reason = first.line.removeprefix('error: ')
            _print(f'stopped, because process {first.rank} failed: {reason}')
        with suppress(RuntimeError):
            self.store.add(_HEARD, 1)

    def _linger(self) -> None:
        """Wait until the others have heard: the store may end with this process."""
        deadline = time.monotonic() + LINGER
        with suppress(RuntimeError):
            while time.monotonic() < deadline and self.store.add(_HEARD, 0) < self.world_size - 1:
                time.sleep(0.1)


def _print(line: str) -> None:
    """Print a line of its own, also where the progress bar of another process stands."""
    print(f'\n{line}', file=sys.stderr, flush=True)


_watch: _Watch | None = None


def _check_torchrun() -> None:
    """Refuse to go on without torchrun's variables."""
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT', 'MASTER_ADDR'):
        value = os.environ.get(name)
        if value is None or not (value.isdigit() or name == 'MASTER_ADDR'):
            raise ConfigError(
                f'--launcher pytorch: {name} is {"not set" if value is None else repr(value)}; '
                'start with `torchrun --nproc_per_node=2 tools/test_quant.py ...`'
            )


def _follow_slurm() -> None:
    """Set torchrun's variables from those of Slurm."""
    for name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'):
        if name not in os.environ:
            raise ConfigError(
                f'--launcher slurm: {name} is not set; start with `srun --ntasks=2 python tools/test_quant.py ...`'
            )
    names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    os.environ |= {ours: os.environ[theirs] for ours, theirs in names.items()}
    # two jobs on one node must not meet
    os.environ.setdefault('MASTER_PORT', str(20000 + int(os.environ.get('SLURM_JOB_ID', 0)) % 20000))
    if 'MASTER_ADDR' not in os.environ:
        nodes = os.environ.get('SLURM_JOB_NODELIST', '')
        try:
            command = ['scontrol', 'show', 'hostnames', nodes]
            os.environ['MASTER_ADDR'] = subprocess.run(command, capture_output=True, text=True).stdout.split()[0]
        except (OSError, IndexError):
            raise ConfigError(
                f"--launcher slurm: scontrol names no host of SLURM_JOB_NODELIST='{nodes}'; set MASTER_ADDR to the "
                'node of the first task'
            ) from None


def _choose_gpu(launcher: str) -> None:
    """Give each process of a machine a GPU of its own, where there are any."""
    if not torch.cuda.is_available():
        return
    local, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    # Slurm may show every task its own GPU only
    if local >= gpus > 1 or (local >= gpus and launcher == 'pytorch'):
        raise ConfigError(f'--launcher {launcher}: process {local} of this machine finds {gpus} GPUs; start fewer')
    torch.cuda.set_device(local % gpus)
