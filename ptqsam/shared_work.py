"""What several runs need is computed by one of them and kept for the others, in the folder of the detector's boxes."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.dist import is_main_process
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptqsam.distributed import decided_by_main
from ptqsam.errors import ConfigError
from ptqsam.fileio import atomic_path, file_lock, fingerprint, write_text

T = TypeVar('T')

# kinds of results that are large, and how many GB (10^9 bytes) of each are kept
LIMITED = ('embeddings', 'statistics')
DEFAULT_GB = 10.0


class _Full(Exception):
    """A kind of results has reached its limit."""


class SharedWork:
    """Results of earlier runs and of those beside this one.

    A file is written whole or not at all, with a checksum. Whatever goes wrong with one costs the time to compute its
    content, and no run: it is said in one line on stderr.

    Args:
        folder: where results lie, each kind in a folder of its own.
        max_gb: GB of each large kind that are kept. Default what PTQSAM_SHARED_GB says, else 10.

    Attributes:
        taken: kinds of which this run has taken something, in that order.

    Raises:
        ConfigError: PTQSAM_SHARED_GB is no number.
    """

    def __init__(self, folder: Path, max_gb: float | None = None) -> None:
        self.folder = folder
        self.max_bytes = 1e9 * (gb_from_environment() if max_gb is None else max_gb)
        self.taken: list[str] = []
        # kinds of which nothing more is kept
        self._closed: set[str] = set()
        self._unwritable = False

    def compute_once(
        self,
        kind: str,
        name: str,
        compute: Callable[[], T],
        load: Callable[[Path], T | None],
        save: Callable[[Path, T], None],
    ) -> T:
        """Take a result from its file, or compute it and write the file.

        Of several runs that want it at once, one computes, and the others wait. Of the processes of one run all have to
        call this, and all compute, or all get what the main one has found.

        Args:
            kind: of the result.
            name: of its file; says all that the result depends on.
            compute: computes it.
            load: reads it; None where the file holds less than is wanted.
            save: writes it to a path.
        """
        path = self.folder / kind / name
        with ExitStack() as stack:
            found = decided_by_main(lambda: self._find(path, load, stack))
            if found is not None:
                if kind not in self.taken:
                    self.taken.append(kind)
                return found
            value = compute()
            if is_main_process():
                self._keep(path, value, save)
        return value

    def _find(self, path: Path, load: Callable[[Path], T | None], stack: ExitStack) -> T | None:
        """The result if it is there; else the right to compute it, until the stack ends."""
        found = _read(path, load, aloud=False)
        if found is not None or not self._keeps(path):
            return found
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(path.with_name(f'.{path.name}.lock'), f'{path}: waiting for another run'))
            for torn in path.parent.glob(f'.{path.stem}.*{path.suffix}'):  # a kill interrupted its writing
                torn.unlink()
        except OSError as error:
            self._give_up(error)
            return None
        return _read(path, load, aloud=True)

    def _keep(self, path: Path, value: T, save: Callable[[Path, T], None]) -> None:
        """Write a file, unless there is no room."""
        if not self._keeps(path):
            return
        kind = path.parent.name
        try:
            with atomic_path(path) as temporary:
                save(temporary, value)
                if kind in LIMITED and folder_bytes(path.parent) > self.max_bytes:
                    raise _Full
        except _Full:
            self._closed.add(kind)
            _say(f'{path.parent}: has {self.max_bytes / 1e9:g} GB (PTQSAM_SHARED_GB), no more {kind} are kept')
        except (OSError, ConfigError, SafetensorError) as error:
            self._give_up(error)

    def _keeps(self, path: Path) -> bool:
        return not self._unwritable and path.parent.name not in self._closed

    def _give_up(self, error: Exception) -> None:
        """Write nothing more in this run."""
        self._unwritable = True
        _say(f'{self.folder}: cannot keep work for other runs here ({_one_line(error)}); this run goes on without')


def gb_from_environment() -> float:
    """Limit of each large kind in GB.

    Raises:
        ConfigError: PTQSAM_SHARED_GB is no number.
    """
    text = os.environ.get('PTQSAM_SHARED_GB') or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float('inf'):
        raise ConfigError(f"PTQSAM_SHARED_GB='{text}' must be a number of GB, for example {DEFAULT_GB:g}")
    return limit


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder; one that vanishes meanwhile does not count."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


def numerics() -> dict[str, Any]:
    """What the last bits of a result depend on beside model and data: library, processor, threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return dict(torch=torch.__version__, device=device, threads=torch.get_num_threads())


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of tensors, as 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, content: tuple[Mapping[str, Tensor], Any]) -> None:
    """Write tensors and plain values that belong to them.

    Args:
        path: safetensors file.
        content: the tensors, on any device; and nested dicts, lists and scalars.
    """
    tensors, plain = content
    orders = {name: memory_order(tensor) for name, tensor in tensors.items()}
    stored = {
        name: tensor.detach().permute(orders[name]).to('cpu', copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # the file has its tensors in an order of its own
    facts = json.dumps(dict(plain=plain, orders={name: orders[name] for name in sorted(orders)}))
    checksum = hash_tensors({name: stored[name] for name in sorted(stored)})
    save_file(stored, path, dict(facts=facts, sha256=fingerprint([facts, checksum])))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_tensors` has written, on the CPU, laid out in memory as it was.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what was written.
    """
    with safe_open(path, 'pt') as file:
        facts, checksum = file.metadata()['facts'], file.metadata()['sha256']
        # copies: what the file maps is aligned otherwise, and last bits of products depend on that
        stored = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    if fingerprint([facts, hash_tensors(stored)]) != checksum:
        raise ValueError('its checksum differs')
    content = json.loads(facts)
    orders = content['orders']
    return {name: stored[name].permute(_inverse(orders[name])) for name in orders}, content['plain']


def save_plain(path: Path, content: dict[str, Any]) -> None:
    """Write nested dicts, lists and scalars as JSON."""
    write_text(path, json.dumps(dict(**content, sha256=fingerprint(content))) + '\n')


def load_plain(path: Path) -> dict[str, Any]:
    """What `save_plain` has written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what was written.
    """
    content = json.loads(path.read_text(encoding='utf-8'))
    if content.pop('sha256') != fingerprint(content):
        raise ValueError('its checksum differs')
    return content


def memory_order(tensor: Tensor) -> list[int]:
    """Axes of a tensor from the outermost in memory to the innermost: kernels and so last bits depend on it."""
    axes = list(range(tensor.dim()))
    return axes if tensor.is_contiguous() else sorted(axes, key=tensor.stride, reverse=True)


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _read(path: Path, load: Callable[[Path], T | None], aloud: bool) -> T | None:
    try:
        return load(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes can break a reader in any way
        if aloud:
            _say(f'{path}: cannot be read ({_one_line(error)}); computing it again')
        return None


def _processor() -> str:
    """Name of the processor."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.partition(':')[2].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
