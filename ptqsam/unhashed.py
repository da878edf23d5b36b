"""In place of a hash that nobody publishes: the version of a file while it is fetched, then the checksums inside it."""

import json
import pickletools
import zipfile
import zlib
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path

ZIP_START = b'PK\x03\x04'
LEGACY_START = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'  # a pickled number, what torch wrote before 1.6
LEGACY_PICKLES = 5  # that number, version, kind of machine, content, names of the storages; then their bytes


@dataclass(frozen=True)
class Version:
    """Which file on a server a part is the beginning of.

    Attributes:
        url: where it is.
        tag: strong ETag, or else the date of its last change, as the server writes it; '' where it says neither.
        total: bytes, or None where the server does not say.
    """

    url: str
    tag: str
    total: int | None

    @property
    def lasting(self) -> bool:
        """Whether a server can be asked for the rest of just this version."""
        return bool(self.tag and self.total)

    def is_of(self, headers: Message, total: int | None) -> bool:
        """Whether an answer with the rest is of this version, which not every server minds."""
        name = 'ETag' if self.tag.startswith('"') else 'Last-Modified'
        return headers.get(name) in (None, self.tag) and total == self.total


def note_version(part: Path, url: str, headers: Message, total: int | None) -> None:
    """Keep beside a part which version it is of, by the headers of the answer with its first byte."""
    etag = headers.get('ETag') or ''
    # a weak one stands for several contents
    tag = etag if etag.startswith('"') else headers.get('Last-Modified') or ''
    # torn by a crash it is no note, and the part starts over
    _note_of(part).write_text(json.dumps(asdict(Version(url, tag, total))) + '\n', encoding='utf-8')


def noted_version(part: Path) -> Version | None:
    """Version that a part is of, or None where that is not known."""
    try:
        return Version(**json.loads(_note_of(part).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return None


def tidy(part: Path, hashed: bool) -> None:
    """Remove a part that nothing can go on with, and a note without its part."""
    version = noted_version(part)
    if part.exists() and not (part.stat().st_size and (hashed or (version and version.lasting))):
        part.unlink()
    if not part.exists():
        _note_of(part).unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint by what it says of itself; runs nothing of it.

    Args:
        path: a file that should be one of torch's.

    Returns:
        What is wrong, or None. Today's format has a checksum for each tensor; of the one before torch 1.6 only the head
        can be read, see `has_checksums`.
    """
    with open(path, 'rb') as file:
        start = file.read(len(LEGACY_START))
        if start == LEGACY_START:
            file.seek(0)
            try:
                for _ in range(LEGACY_PICKLES):
                    _ = list(pickletools.genops(file))
            except Exception as error:  # foreign bytes can break the reader in any way
                return f'its head cannot be read ({" ".join(str(error).split())})'
            return None
    return _zip_damage(path) if start.startswith(ZIP_START) else 'it is no file of torch'


def has_checksums(path: Path) -> bool:
    """Whether `damage` has looked at all of a file."""
    return zipfile.is_zipfile(path)


def _zip_damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith('/data.pkl') for name in archive.namelist()):
                return 'it is no file of torch but another zip file'
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        return f'it is truncated or damaged ({" ".join(str(error).split())})'
    return f'it is damaged in {bad}' if bad else None


def _note_of(part: Path) -> Path:
    return part.with_name(f'{part.name}.version')
