"""Files that are either complete or absent, and names that change with their content."""

import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ptqsam.errors import ConfigError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, remove it on failure.

    Args:
        path: final name; missing parent folders are made.

    Yields:
        Path to write to, in the same folder (so that the rename is atomic) and with the same suffix.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.stem}.', suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise ConfigError(
            f'{path.parent}: cannot write here ({error.strerror}); choose another folder, for example with --work-dir'
        ) from None
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give the usual permissions before the name becomes visible
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: str | os.PathLike, work: str) -> Iterator[None]:
    """Let one process at a time do some work in a folder; ends with the process, leaves no file behind.

    Args:
        folder: an existing folder.
        work: what another process may be doing there, told on stderr while this one waits.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{folder}: waiting for another {work}', file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems cannot lock a folder; hashes still guard what is written
        yield
    finally:
        os.close(handle)


@contextmanager
def file_lock(path: str | os.PathLike, waiting: str) -> Iterator[None]:
    """Let one process at a time do what a lock file stands for; the file is removed afterwards.

    The lock belongs to the process and not to those that it starts (data loaders), so it ends with it, however it ends.

    Args:
        path: the lock file, in an existing folder.
        waiting: said on stderr, once, where this process has to wait.

    Raises:
        OSError: the file cannot be made.
    """
    path, said = Path(path), False
    while True:
        with open(path, 'ab') as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if not said:
                    print(waiting, file=sys.stderr, flush=True)
                    said = True
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:
                pass  # some network file systems have no locks; what is written still appears as a whole
            if not _is_file_of(path, file.fileno()):
                continue  # the holder before has removed it
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _is_file_of(path: Path, handle: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent) + '\n')


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content as 64 hex digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def fingerprint(value: Any) -> str:
    """Short name of a JSON-like value: equal values give equal names.

    Args:
        value: nested dicts, lists and scalars; anything else counts by its ``str``.

    Returns:
        16 hex digits of the SHA-256 of the canonical JSON text.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
