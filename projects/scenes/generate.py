"""Write scenes as a COCO-format data set, bit-reproducible from a seed.

Layout::

    ROOT/train/000001.png ...        ROOT/annotations/instances_train.json
    ROOT/val/100001.png ...          ROOT/annotations/instances_val.json
    ROOT/scenes.json                 settings and sha256 of every file, written last
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from projects.scenes.compose import Scene, compose_scene
from projects.scenes.photographs import load_photographs
from projects.scenes.shapes import SHAPES
from ptqsam.errors import ConfigError
from ptqsam.fileio import sha256_file, write_json
from ptqsam.progress import progress as progress_bar

VERSION = 1  # counts changes of the pictures or annotations; an older data set is regenerated
CATEGORIES = tuple(SHAPES)  # in the order of the category ids 1, 2, ...
MANIFEST = 'scenes.json'

# Image ids, and with them file names and annotation ids, are unique over both splits and do not depend on how many
# images are made, so that overlap checks work and a larger set contains the smaller one.
FIRST_ID = {'train': 1, 'val': 100_001}
MAX_IMAGES = 100_000
ANNOTATION_STRIDE = 100

_OWN_FILE = re.compile(r'((train|val)/\d{6}\.png|annotations/instances_(train|val)\.json|scenes\.json)')
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Settings:
    """What determines the data set, bit by bit.

    Args:
        num_train: images in the train split.
        num_val: images in the val split.
        seed: of all chance.
        version: of the generator.
    """

    num_train: int = 32
    num_val: int = 24
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ('num_train', 'num_val'):
            if not 1 <= getattr(self, name) <= MAX_IMAGES:
                raise ConfigError(f'scenes: {name} is {getattr(self, name)}; choose 1 to {MAX_IMAGES}')
        if self.seed < 0:
            raise ConfigError(f'scenes: seed is {self.seed}; choose 0 or a positive number')

    def image_ids(self, split: str) -> range:
        """Ids of the images of a split."""
        count = {'train': self.num_train, 'val': self.num_val}[split]
        return range(FIRST_ID[split], FIRST_ID[split] + count)


def generate_scenes(
    root: str | os.PathLike, num_train: int = 32, num_val: int = 24, seed: int = 0, progress: bool = True
) -> Path:
    """Make the data set, unless an intact one with the same settings lies there already.

    Everything is written into a folder beside ``root`` and renamed, so ``root`` is complete or absent at any time.

    Args:
        root: folder of the data set; replaced when it holds an older, damaged or differently made one.
        num_train: images in the train split.
        num_val: images in the val split.
        seed: of all chance.
        progress: show a progress bar on stderr.

    Returns:
        ``root`` as a path.

    Raises:
        ConfigError: a number is out of range, ``root`` holds foreign files, or the disk refuses.
        AssetError: the installed scikit-image lacks a photograph.
    """
    root = Path(root)
    settings = Settings(num_train, num_val, seed)
    if _is_intact(root, settings):
        return root
    _refuse_foreign_files(root)
    try:
        with _replacing(root.resolve()) as folder:
            write_json(folder / MANIFEST, _write_dataset(folder, settings, progress))
    except OSError as error:
        raise ConfigError(
            f'{root}: cannot write the scenes ({error.strerror or error}); choose another folder or set PTQSAM_DATA'
        ) from None
    return root


def read_manifest(root: str | os.PathLike) -> dict[str, Any] | None:
    """Read ``scenes.json``.

    Args:
        root: folder of the data set.

    Returns:
        Keys ``settings``, ``objects`` (count per split), ``content`` (sha256 of all pixels and annotations, the same
        for every PNG compressor) and ``files`` (sha256 by relative path); None where it is absent or unreadable.
    """
    try:
        manifest = json.loads((Path(root) / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def scene_at(image_id: int, split: str, seed: int, photos: list | None = None) -> Scene:
    """Compose the scene of one image; depends on nothing but the arguments.

    Args:
        image_id: COCO image id.
        split: 'train' or 'val'.
        seed: of the data set.
        photos: the split's photographs, when they are loaded already.

    Returns:
        The scene with its layers.
    """
    return compose_scene(photos or load_photographs(split), np.random.default_rng([seed, image_id]))


def _is_intact(root: Path, settings: Settings) -> bool:
    manifest = read_manifest(root)
    if manifest is None or manifest.get('settings') != asdict(settings):
        return False
    try:
        return all(sha256_file(root / name) == digest for name, digest in manifest['files'].items())
    except (OSError, KeyError, AttributeError):
        return False


def _refuse_foreign_files(root: Path) -> None:
    """Never delete what this module did not write, for example with ``--root data``."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f'{root}: is a file; name a folder for the scenes')
    for folder, _, names in os.walk(root):
        for name in names:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            if not _OWN_FILE.fullmatch(relative):
                raise ConfigError(
                    f"{root}: holds '{relative}', which is not part of the scenes and would be lost; "
                    'move it away or name another folder'
                )


@contextmanager
def _replacing(root: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``root`` that takes its place on success and vanishes on failure."""
    root.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in root.parent.glob(f'.{root.name}.*.partial'):  # of runs that were killed outright
        if time.time() - abandoned.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(abandoned, ignore_errors=True)
    token = secrets.token_hex(4)
    fresh, old = (root.with_name(f'.{root.name}.{kind}{token}.partial') for kind in ('new-', 'old-'))
    try:
        fresh.mkdir()
        yield fresh
        if root.exists():
            root.rename(old)
        fresh.rename(root)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write_dataset(folder: Path, settings: Settings, progress: bool) -> dict[str, Any]:
    """Write pictures and annotations of both splits; return the manifest."""
    photos = {split: load_photographs(split) for split in FIRST_ID}
    datasets = {split: _empty_coco(settings) for split in FIRST_ID}
    jobs = [(split, image_id) for split in FIRST_ID for image_id in settings.image_ids(split)]
    content = hashlib.sha256()
    for name in (*FIRST_ID, 'annotations'):
        (folder / name).mkdir()
    for split, image_id in progress_bar(jobs, 'make scenes', 'image') if progress else jobs:
        scene = scene_at(image_id, split, settings.seed, photos[split])
        name = f'{image_id:06d}.png'
        Image.fromarray(scene.image).save(folder / split / name)
        height, width = scene.owner.shape
        datasets[split]['images'].append({'id': image_id, 'file_name': name, 'width': width, 'height': height})
        datasets[split]['annotations'] += coco_annotations(scene, image_id)
        content.update(scene.image.tobytes())
    for split, dataset in datasets.items():
        write_json(folder / 'annotations' / f'instances_{split}.json', dataset, indent=None)
        content.update(json.dumps(dataset, sort_keys=True).encode())
    written = sorted(path for path in folder.rglob('*') if path.is_file())
    return {
        'settings': asdict(settings),
        'objects': {split: len(dataset['annotations']) for split, dataset in datasets.items()},
        'content': content.hexdigest(),
        'files': {path.relative_to(folder).as_posix(): sha256_file(path) for path in written},
    }


def coco_annotations(scene: Scene, image_id: int) -> list[dict[str, Any]]:
    """Annotations of one scene: the visible part of every object.

    Args:
        scene: composed scene.
        image_id: COCO image id; annotation ids follow from it.

    Returns:
        One dict per object: ``segmentation`` is compressed RLE with ``counts`` as str, ``bbox`` [x, y, width, height]
        and ``area`` in pixels are those of the visible mask.
    """
    annotations = []
    for index, (category, mask) in enumerate(scene.objects()):
        encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        x, y = int(columns[0]), int(rows[0])
        annotations.append(
            {
                'id': image_id * ANNOTATION_STRIDE + index,
                'image_id': image_id,
                'category_id': CATEGORIES.index(category) + 1,
                'segmentation': {'size': [int(n) for n in encoded['size']], 'counts': encoded['counts'].decode()},
                'bbox': [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
                'area': int(mask.sum()),
                'iscrowd': 0,
            }
        )
    return annotations


def _empty_coco(settings: Settings) -> dict[str, Any]:
    return {
        'info': {'description': 'ptqsam scenes', 'version': str(settings.version), 'seed': settings.seed},
        'licenses': [],
        'images': [],
        'annotations': [],
        'categories': [
            {'id': number, 'name': name, 'supercategory': 'shape'} for number, name in enumerate(CATEGORIES, start=1)
        ],
    }
