"""COCO 2017: its archives, how they become folders of images and annotations, and which command fetches what."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptqsam.download import Checkpoint, download_file
from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import folder_lock
from ptqsam.sources import Url, check_space, file_size, item_bar

# the official server, and its storage for networks that let only https pass; what comes is checked either way
SERVERS = ('http://images.cocodataset.org/', 'https://s3.amazonaws.com/images.cocodataset.org/')


@dataclass(frozen=True)
class Archive(Checkpoint):
    """One official archive, and what is kept of it.

    Attributes:
        folder: of the data set, and inside the archive.
        files: pattern of the names in that folder that are kept; nothing else is ever unpacked.
        count: how many there are.
        unpacked: bytes of all of them, about.
        noun: what they are.
    """

    folder: str = ''
    files: str = r'\d{12}\.jpg'
    count: int = 0
    unpacked: int = 0
    noun: str = 'images'

    def found(self, root: Path) -> int:
        """How many of its files lie in the folder of the data set, as far as their names tell."""
        folder = root / self.folder
        if not folder.is_dir():
            return 0
        with os.scandir(folder) as entries:
            return sum(re.fullmatch(self.files, entry.name) is not None for entry in entries)

    def begun(self, root: Path) -> int:
        """Bytes of the archive that have been downloaded already."""
        return file_size(root / self.file_name) or file_size(root / f'{self.file_name}.part')

    def status(self, root: str | os.PathLike | None = None, verify: bool = False) -> str:
        """Say in a few words what of the archive there is; ``root`` is the folder above ``coco``."""
        place = coco_root(root)
        found = self.found(place)
        if found >= self.count:
            return f'yes, {found:,} {self.noun}'
        got = self.begun(place)
        partly = f'{found:,} of {self.count:,} {self.noun}' if found else 'no'
        return f'{partly}; archive not unpacked, {got:,} bytes' if got else partly


def _archive(name: str, url: str, sha256: str, size: int, **contents: str | int) -> Archive:
    return Archive(
        name,
        Path(url).name,
        tuple(Url(server + url) for server in SERVERS),
        sha256,
        'CC-BY-4.0' if name == 'coco_annotations' else 'of each image, in the annotations',
        f'COCO 2017, {contents["folder"]}',
        size,
        **contents,  # type: ignore[arg-type]
    )


# The publisher states neither size nor hash. These are what torchvision's prototype of COCO and others compare with,
# and what mirrors state beside the better known MD5 sums f4bbac64..., 442b8da7... and cced6f7f...
ARCHIVES: dict[str, Archive] = {
    archive.name: archive
    for archive in (
        _archive(
            'coco_annotations',
            'annotations/annotations_trainval2017.zip',
            '113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268',
            252_907_541,
            folder='annotations',
            files=r'instances_(train|val)2017\.json',
            count=2,
            unpacked=490_000_000,
            noun='files',
        ),
        _archive(
            'coco_val',
            'zips/val2017.zip',
            '4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05',
            815_585_330,
            folder='val2017',
            count=5_000,
            unpacked=820_000_000,
        ),
        _archive(
            'coco_train',
            'zips/train2017.zip',
            '69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929',
            19_336_861_798,
            folder='train2017',
            count=118_287,
            unpacked=19_400_000_000,
        ),
    )
}


def coco_root(data: str | os.PathLike | None = None) -> Path:
    """Folder of COCO: ``coco`` in ``data``, or in the environment variable PTQSAM_DATA, or in ``data``."""
    return Path(data or os.environ.get('PTQSAM_DATA') or 'data').expanduser() / 'coco'


def fetch_archives(
    names: Sequence[str], data: str | os.PathLike | None = None, progress: bool = True, keep_archives: bool = False
) -> Iterator[Path]:
    """Make sure that folders of COCO are complete: download each archive, unpack it, delete the archive.

    Args:
        names: names of the table.
        data: folder above ``coco``; default as in :func:`coco_root`.
        progress: show what is done and the remaining time on stderr.
        keep_archives: do not delete them.

    Yields:
        Each folder of images or annotations when it is complete.

    Raises:
        ConfigError: the folder cannot be written, or the disk is too small for all of them; said before anything is
            fetched.
        AssetError: no source gave an archive, or it is damaged.
    """
    root = coco_root(data)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with folder_lock(root, 'download into this folder'):
            missing = [archive for archive in map(ARCHIVES.__getitem__, names) if archive.found(root) < archive.count]
            _check_room(missing, root, keep_archives)
            for archive in map(ARCHIVES.__getitem__, names):
                if archive in missing:
                    _fetch(archive, root, progress, keep_archives)
                yield root / archive.folder
    except OSError as error:
        raise unwritable(root, error) from None


def unwritable(root: Path, error: OSError) -> ConfigError:
    """What to say when the folder of the data set cannot be used."""
    return ConfigError(
        f'{root}: cannot be written or read ({error.strerror}); choose another folder with --data or PTQSAM_DATA'
    )


def _check_room(archives: Sequence[Archive], root: Path, keep_archives: bool) -> None:
    """Refuse archives for which the disk has no room; one that is unpacked makes room for the next."""
    transfers, files = [0], 0
    for archive in archives:
        staged = sum(entry.stat().st_size for entry in _staging(root, archive).glob('*'))
        transfers.append(max((archive.size or 0) - archive.begun(root), 0))
        files += max(archive.unpacked - staged, 0)
    names = ', '.join(archive.name for archive in archives)
    check_space(root, files + (sum if keep_archives else max)(transfers), f'{names} (archive and files side by side)')


def _fetch(archive: Archive, root: Path, progress: bool, keep_archives: bool) -> None:
    """Download what is missing of an archive, and unpack it."""
    path = root / archive.file_name
    if not path.exists():
        download_file(archive, path, progress)
    elif problem := archive.problem(path, verify=False):
        raise AssetError(f'{path}: not the official archive, {problem}; delete it and run the same command again')
    unpack(archive, path, root, progress)
    if not keep_archives:
        path.unlink()


def _staging(root: Path, archive: Archive) -> Path:
    """Where files lie until all of them are there."""
    return root / f'.{archive.folder}.unpacking'


def unpack(archive: Archive, zip_path: Path, root: Path, progress: bool = True) -> None:
    """Unpack an archive so that its folder appears when it is complete; an interrupted run is gone on with.

    Only files whose whole name in the archive is as expected are written, so none can leave the folder. Images that are
    there already stay if they have the right size, annotation files in any case.

    Args:
        archive: which.
        zip_path: where it lies; every file is checked against the checksum in it.
        root: folder of the data set.
        progress: show the number of files and the remaining time on stderr.

    Raises:
        AssetError: damaged, or files are missing in it.
    """
    folder, staging = root / archive.folder, _staging(root, archive)
    advice = 'delete it and run the same command again'
    try:
        with zipfile.ZipFile(zip_path) as content:
            pattern = f'{archive.folder}/{archive.files}'
            members = [member for member in content.infolist() if re.fullmatch(pattern, member.filename)]
            if len(members) < archive.count:
                raise AssetError(
                    f'{zip_path}: holds {len(members):,} of {archive.count:,} {archive.noun} of {archive.folder}/; '
                    f'{advice}'
                )
            staging.mkdir(exist_ok=True)
            for member in item_bar(members, f'unpack {archive.name}', 'file', progress):
                name = member.filename.rpartition('/')[2]
                if not _is_there(folder / name, None if archive.noun == 'files' else member.file_size):
                    _unpack_one(content, member, staging / name)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise AssetError(f'{zip_path}: damaged archive ({" ".join(str(error).split())}); {advice}') from None
    if not folder.exists():
        staging.rename(folder)
        return
    for file in staging.iterdir():
        file.replace(folder / file.name)
    staging.rmdir()


def _is_there(path: Path, size: int | None) -> bool:
    """Whether a file has the given size, or just any content."""
    return file_size(path) == size if size is not None else file_size(path) > 0


def _unpack_one(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one file, unless an earlier run did."""
    if not _is_there(path, member.file_size):
        with content.open(member) as source, open(path, 'wb') as file:
            while chunk := source.read(1 << 20):
                file.write(chunk)


def is_coco(root: Path) -> bool:
    """Whether a folder is, by its name, one that `tools/download.py` fills."""
    return root.name == 'coco'


def data_option(root: Path) -> str:
    """What lets `tools/download.py` fill a folder of COCO; '' where it would in any case."""
    return '' if root.absolute() == coco_root().absolute() else f' --data {root.parent}'


def fetch_advice(path: str | os.PathLike) -> str:
    """Command that fetches a file of COCO that is missing, or '' where the file is of no such data set.

    Args:
        path: an image or annotation file where a run looks for it.
    """
    path = Path(path)
    root = path.parent.parent
    archive = next((a for a in ARCHIVES.values() if a.folder == path.parent.name), None)
    if archive is None or not is_coco(root) or not re.fullmatch(archive.files, path.name):
        return ''
    folder = data_option(root)
    command = f'fetch it with `python tools/download.py {archive.name}{folder}`'
    alone = {
        'coco_train': f', or with `coco --subset 0{folder}` what calibrates alone',
        'coco_val': f', or with `coco --subset N{folder}` what --limit N evaluates',
    }
    return command + alone.get(archive.name, '')
