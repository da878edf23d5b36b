"""What a unit saw and gave for each calibration image, kept on the device, in host memory or on disk.

Much of it is there more than once: the image embedding is repeated for every box, positional encodings are the same for
every image. Each is stored once and expanded when it is asked for.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ptqsam.errors import ConfigError
from ptqsam.reconstruction.stores import FileKeeper, MemoryKeeper, free_device_memory, free_host_memory

Store = Literal['device', 'host', 'disk']
Select = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]

# of the memory that is free, what a cache may take; the rest is for the optimisation of a unit
SHARE = 0.6
# values that are compared before two tensors are compared in full
PROBES = 64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ActivationCache:
    """Entries of tensors, one entry per calibration image.

    Of a tensor whose slices along dim 0 are all equal, bit for bit, or that has a stride of 0, one slice is stored; a
    tensor that equals the same one of the previous entry is shared with it. Files on disk have no name, so that they
    vanish with the process, however it ends.

    Args:
        store: where entries lie: 'device', 'host' (pinned memory if the device is CUDA) or 'disk'.
        device: where `get` puts what it returns.
        dtype: floating-point tensors are stored in it: float32 or bfloat16; integers and bools stay as they are.
        folder: for files on disk; made if missing.

    Attributes:
        place: device on which ``select`` sees the tensors, so where its indices should lie.

    Raises:
        ConfigError: unknown store or dtype, or the folder cannot be written.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        folder: str | os.PathLike | None = None,
    ) -> None:
        if store not in ('device', 'host', 'disk'):
            raise ConfigError(f"reconstruction.cache.store: unknown '{store}'; use device, host or disk")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f'reconstruction.cache.dtype: cannot store {dtype}; use float32 or bfloat16')
        device = torch.device(device)
        if device.type == 'cuda' and device.index is None:
            device = torch.device('cuda', torch.cuda.current_device())
        self.store = store
        self.device = device
        self.dtype = dtype
        self.place = device if store == 'device' else torch.device('cpu')
        self._keeper: MemoryKeeper | FileKeeper
        if store == 'disk':
            if folder is None:
                raise ConfigError('reconstruction.cache.store=disk: no folder was given; use store=host')
            self._keeper = FileKeeper(Path(folder))
        else:
            self._keeper = MemoryKeeper(self.place, pin=store == 'host' and device.type == 'cuda')
        # copies to the device run beside the computation
        self._copies = torch.cuda.Stream(device) if device.type == 'cuda' and store != 'device' else None
        self._entries: list[tuple[_Slot, ...]] = []
        self._ready: dict[tuple[int, Select | None], tuple[tuple[Tensor, ...], torch.cuda.Event]] = {}
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, each thing counted once."""
        return self._nbytes

    def append(self, tensors: Sequence[Tensor]) -> None:
        """Store copies of the tensors of the next image.

        Args:
            tensors: any shapes, on any device.

        Raises:
            ConfigError: out of memory or of space on disk; the message names the options to change.
        """
        previous = self._entries[-1] if self._entries else ()
        # an inference tensor could not take part in the optimisation later
        with self._memory_errors(), torch.inference_mode(False), torch.no_grad():
            slots, added = [], 0
            for number, tensor in enumerate(tensors):
                single = _single(tensor.detach())
                stored = single.to(self._stored_dtype(tensor), memory_format=torch.contiguous_format)
                if number < len(previous) and _equal(previous[number], stored):
                    load = previous[number].load
                else:
                    load = self._keeper.put(stored)
                    added += stored.nbytes
                slots.append(_Slot(load, stored.shape, stored.dtype, tensor.shape))
        self._entries.append(tuple(slots))
        self._nbytes += added

    def get(self, index: int, select: Select | None = None) -> tuple[Tensor, ...]:
        """The tensors of an image, or what ``select`` takes from them.

        Args:
            index: number of the entry.
            select: takes the stored tensors (on ``place``, in the stored dtype, repeated slices with stride 0) and
                returns parts of them; it should only index. It runs before anything is converted or moved, so only
                what it returns is read from disk and travels.

        Returns:
            Tensors on ``device``, float32 where they are floating point. Do not write to them: where nothing has to
            be converted or moved they are the stored ones, without a copy.

        Raises:
            ConfigError: out of memory.
        """
        ready = self._ready.pop((index, select), None) if self._ready else None
        if ready is None:
            with self._memory_errors():
                return self._fetch(index, select)
        tensors, copied = ready
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in tensors:
            # made on the stream of the copies; must not be given to the next copy while this stream reads it
            tensor.record_stream(stream)
        return tensors

    def prefetch(self, index: int, select: Select | None = None) -> None:
        """Start the copy to a CUDA device for the next `get` with the same arguments; does nothing elsewhere.

        What is never asked for stays on the device until `clear`.

        Args:
            index: number of the entry.
            select: as for `get`; it runs now, and has to be the same or an equal object then.

        Raises:
            ConfigError: out of memory.
        """
        if self._copies is None or (index, select) in self._ready:
            return
        with self._memory_errors(), torch.cuda.stream(self._copies):
            tensors = self._fetch(index, select)
            self._ready[index, select] = tensors, self._copies.record_event()

    def clear(self) -> None:
        """Forget all entries and give their memory or disk space back, as soon as nobody holds what `get` returned."""
        self._ready.clear()
        self._entries.clear()
        self._keeper.clear()
        self._nbytes = 0

    def _stored_dtype(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _fetch(self, index: int, select: Select | None) -> tuple[Tensor, ...]:
        tensors = tuple(slot.load().expand(slot.full_shape) for slot in self._entries[index])
        chosen = tensors if select is None else select(tensors)
        return tuple(self._deliver(tensor) for tensor in chosen)

    def _deliver(self, tensor: Tensor) -> Tensor:
        """Move and convert; repeated slices travel once."""
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if tensor.device == self.device and tensor.dtype == dtype:
            return tensor
        single = _strip(tensor)
        if self._copies is not None and single.is_cpu:
            # only copies from dense pinned memory do not make the host wait
            if not (single.is_contiguous() and single.is_pinned()):
                single = torch.empty(single.shape, dtype=single.dtype, pin_memory=True).copy_(single)
            single = single.to(self.device, non_blocking=True)
        return single.to(self.device, dtype).expand(tensor.shape)

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition('\n')[0] or type(error).__name__
            raise _no_room(f'of {self.nbytes / 1e9:.1f} GB ({len(self)} images) on {self.store}', reason) from None


def entry_bytes(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that an entry takes, before anything is shared with the previous one.

    Args:
        tensors: what would be appended; of meta tensors only strides of 0 tell what is repeated.
        dtype: as for `ActivationCache`.

    Returns:
        What ``nbytes`` grows by when the tensors are appended to an empty cache.
    """
    singles = [_single(tensor.detach()) for tensor in tensors]
    return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.dtype.itemsize) for t in singles)


def choose_store(
    nbytes: int, device: torch.device | str, limit: int | None = None, folder: str | os.PathLike | None = None
) -> Store:
    """The fastest store with room for a cache.

    Args:
        nbytes: estimated size, see `entry_bytes`.
        device: where the units are optimised.
        limit: bytes of device or host memory that the cache may take; default 0.6 of what is free.
        folder: for files on disk; default the system's folder for temporary files.

    Returns:
        'device' (only if it is not the CPU), 'host' or 'disk'.

    Raises:
        ConfigError: there is room nowhere; the message names the options to change.
    """
    device = torch.device(device)

    def fits(free: int) -> bool:
        return nbytes <= (SHARE * free if limit is None else min(limit, free))

    if device.type == 'cuda' and fits(free_device_memory(device)):
        return 'device'
    if fits(free_host_memory()):
        return 'host'
    folder = Path(folder or tempfile.gettempdir()).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if nbytes <= free:
        return 'disk'
    raise _no_room(f'of {nbytes / 1e9:.1f} GB', f'{free / 1e9:.1f} GB are free in {folder}')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory, on the device or the host, or disk space ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
    # the allocators of the CPU and of pinned memory
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or 'out of memory' in text)


@dataclass(frozen=True)
class _Slot:
    """A tensor of an entry.

    Attributes:
        load: gives the stored tensor, of ``shape`` and ``dtype``.
        full_shape: what it is expanded to.
    """

    load: Callable[[], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    full_shape: torch.Size


def _no_room(what: str, reason: str) -> ConfigError:
    return ConfigError(
        f'no room for an activation cache {what}: {reason}; set reconstruction.cache.store to another of '
        'device|host|disk, reconstruction.cache.dtype=bfloat16, or less in reconstruction.max_boxes or '
        'calibration.num_images'
    )


def _strip(tensor: Tensor) -> Tensor:
    """Length 1 wherever the stride is 0."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _single(tensor: Tensor) -> Tensor:
    """What has to be stored of a tensor so that `expand` gives it back."""
    tensor = _strip(tensor)
    if tensor.is_meta or tensor.ndim == 0 or len(tensor) < 2 or tensor.numel() == 0:
        return tensor
    bits = _bits(tensor)
    first = last = bits
    for _ in tensor.shape[1:]:
        first, last = first.select(1, 0), last.select(1, -1)
    # the first value of every slice, the last one, and only then everything
    for probe in (first, last, bits):
        if not torch.equal(probe[1:], probe[:-1]):
            return tensor
    return tensor[:1]


def _equal(slot: _Slot, tensor: Tensor) -> bool:
    """Whether a dense tensor is what is stored, bit for bit."""
    if (slot.shape, slot.dtype) != (tensor.shape, tensor.dtype):
        return False
    stored, bits = _bits(slot.load()).flatten(), _bits(tensor).flatten()
    step = max(1, bits.numel() // PROBES)
    return all(torch.equal(stored[::by].to(bits.device), bits[::by]) for by in (step, 1))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN equals NaN, and 0 differs from -0."""
    return tensor.view(_INTEGERS[tensor.element_size()])
