"""Where cached activations lie: memory or a file; and how much room there is."""

import math
import mmap
import os
import tempfile
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ptqsam.errors import ConfigError

# pinned memory is asked for in pieces of a power of two, which is what torch rounds every request up to
MIN_ARENA = 1 << 26


class MemoryKeeper:
    """Copies in memory; pinned ones lie side by side in a few large pieces."""

    def __init__(self, device: torch.device, pin: bool, arena: int = MIN_ARENA) -> None:
        self.device = device
        self.pin = pin
        self.arena = arena
        self.clear()

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copy a dense tensor; the result gives the copy."""
        if self.pin:
            kept = self._take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)
        else:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor)
        return lambda: kept

    def clear(self) -> None:
        """Let go of the memory."""
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = self._total = 0

    def _take(self, size: int) -> Tensor:
        start = -(-self._used // 64) * 64
        if start + size > len(self._piece):
            # pieces grow with the cache, so that a small one pins little and a large one wastes little
            wanted = max(self.arena, 4 * size, self._total // 8)
            self._piece = self._allocate(1 << math.ceil(math.log2(wanted)))
            self._total += len(self._piece)
            start = 0
        self._used = start + size
        return self._piece[start : start + size]

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class FileKeeper:
    """Copies in one growing file without a name, mapped while they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = self._open()
        self._end = 0

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a dense tensor; the result maps it into memory, on the CPU, and holds it there as long as it lives."""
        if tensor.numel() == 0:
            # nothing of length 0 can be mapped
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            return lambda: empty
        if self._file.closed:
            self._file = self._open()
        # to fresh memory, where a single value has a stride of 1 as well
        dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        payload = dense.view(torch.uint8).numpy().data
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            written = 0
            while written < len(payload):
                written += os.pwrite(self._file.fileno(), payload[written:], start + written)
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end = start + len(payload)
        return partial(self._map, start, len(payload), tensor.shape, tensor.dtype)

    def clear(self) -> None:
        """Let go of the file."""
        # not cut to length 0: whoever still reads a mapping of it would die of a bus error
        self._file.close()
        self._end = 0

    def _open(self) -> FileIO:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as error:
            raise ConfigError(
                f'{self.folder}: cannot keep activations here ({error.strerror}); choose another folder with '
                '--work-dir, or set reconstruction.cache.store=host'
            ) from None

    def _map(self, start: int, size: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        # a private mapping: a write would not reach the file
        mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)


def free_host_memory(root: str | os.PathLike = '/') -> int:
    """Bytes of memory that this process can still take: what the machine has free, and what its containers leave it.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    root = Path(root)
    meminfo = (root / 'proc/meminfo').read_text().splitlines()
    free = [1024 * int(line.split()[1]) for line in meminfo if line.startswith('MemAvailable:')]
    try:
        groups = (root / 'proc/self/cgroup').read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = group.split(':', 2)
        if controllers == '':
            mount, limit, used, cached = 'sys/fs/cgroup', 'memory.max', 'memory.current', 'inactive_file'
        elif 'memory' in controllers.split(','):
            mount, limit = 'sys/fs/cgroup/memory', 'memory.limit_in_bytes'
            used, cached = 'memory.usage_in_bytes', 'total_inactive_file'
        else:
            continue
        inner = Path(path.lstrip('/'))
        # inside a container the path may be one of the host, then only the mount itself exists
        for folder in {root / mount / part for part in (inner, *inner.parents)}:
            free.append(_left_by(folder, limit, used, cached))
    return max(0, min(free))


def free_device_memory(device: torch.device) -> int:
    """Bytes free on a CUDA device, with what torch holds there without using it."""
    free = torch.cuda.mem_get_info(device)[0]
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _left_by(folder: Path, limit: str, used: str, cached: str) -> int:
    """Bytes that a control group still allows; what it holds of files can be dropped."""
    try:
        allowed, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / 'memory.stat').read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62  # no such group, or 'max'
    return allowed - taken + int(stat.get(cached, 0))
