"""Single images of COCO: those that one run needs, fetched one by one over several connections."""

import json
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ptqsam import coco_files
from ptqsam.coco_files import coco_root, fetch_archives, unwritable
from ptqsam.download import Checkpoint, download_file
from ptqsam.errors import AssetError, PTQSAMError
from ptqsam.fileio import folder_lock
from ptqsam.sources import Url, check_space, item_bar

CONNECTIONS = 8
# of an image of COCO, on average a little less
IMAGE_BYTES = 170_000


@dataclass(frozen=True)
class CocoImage(Checkpoint):
    """An image that is whole when it can be decoded and has the size that the annotations say.

    Attributes:
        width, height: in pixels.
    """

    width: int = 0
    height: int = 0

    def problem(self, path: Path, verify: bool = True) -> str | None:
        """Say what is wrong with a file, or None; it is always decoded."""
        try:
            with Image.open(path) as image:
                image.load()
                if image.size == (self.width, self.height):
                    return None
                return f'it has {image.size} pixels, not {(self.width, self.height)}'
        except Exception as error:  # decoders raise all kinds
            return f'it cannot be decoded ({" ".join(str(error).split())})'


@dataclass(frozen=True)
class Subset:
    """Images of COCO that a run needs.

    Attributes:
        val: entries of the annotation file, those that are evaluated.
        train: those that calibrate.
    """

    val: list[dict[str, Any]]
    train: list[dict[str, Any]]


def read_images(path: str | os.PathLike) -> list[dict[str, Any]]:
    """List of images of an annotation file in COCO format, in order, without its objects, which are most of it.

    Args:
        path: instances file.

    Returns:
        Its entries: ``id``, ``file_name``, ``width``, ``height``, ...

    Raises:
        AssetError: missing, damaged, or without a list of images.
    """
    advice = coco_files.fetch_advice(path) or 'get or make it again'
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'no text'
        raise AssetError(f'{path}: cannot read this annotation file ({reason}); {advice}') from None
    place = text.find('"images"')
    start = text.find('[', place)
    try:
        # what stands between is a colon, unless this is the name of something else
        if place < 0 or text[place + len('"images"') : start].strip() != ':':
            images = json.loads(text)['images']
        else:
            images, _ = json.JSONDecoder().raw_decode(text, start)
        _ = [(image['file_name'], image['width'], image['height']) for image in images]
    except (ValueError, KeyError, TypeError) as error:
        reason = ' '.join(str(error).split())
        raise AssetError(f'{path}: annotation file is damaged or has no list of images ({reason}); {advice}') from None
    return images


def choose_images(
    train: Sequence[dict[str, Any]],
    val: Sequence[dict[str, Any]],
    limit: int | None,
    num_images: int,
    seed: int,
    first: bool = False,
) -> Subset:
    """Images that a run reads.

    Args:
        train, val: from `read_images`.
        limit: images that are evaluated, the first ones; None: all.
        num_images: calibration images.
        seed: of their draw.
        first: no draw, the first ones (`compat.first_images`).

    Raises:
        ConfigError: fewer calibration images than wanted.
    """
    from ptqsam.solver.calibrate import draw_images  # torch comes with it, which other downloads need not wait for

    names = [[Path(image['file_name']).name for image in images] for images in (train, val)]
    drawn = draw_images(names[0], names[1], num_images, seed, first)
    return Subset(list(val)[:limit], [train[index] for index in drawn])


def fetch_subset(
    data: str | os.PathLike | None,
    limit: int,
    num_images: int = 32,
    seed: int = 0,
    first: bool = False,
    progress: bool = True,
) -> Subset:
    """Fetch what a run with ``--limit`` needs of COCO: annotations, the evaluated and the calibration images.

    Args:
        data: folder above ``coco``; default as in `coco_root`.
        limit, num_images, seed, first: see `choose_images`.
        progress: show what is done and the remaining time on stderr.

    Returns:
        The images, all of which are there and whole.

    Raises:
        AssetError: images are missing at the end; those that came stay.
        ConfigError: the folder cannot be written, the disk is too small, or too many images are wanted.
    """
    root = coco_root(data)
    files = {split: root / 'annotations' / f'instances_{split}2017.json' for split in ('train', 'val')}
    if not all(file.is_file() for file in files.values()):
        _ = list(fetch_archives(['coco_annotations'], data, progress))
    subset = choose_images(read_images(files['train']), read_images(files['val']), limit, num_images, seed, first)
    jobs = []
    for split, images in (('train', subset.train), ('val', subset.val)):
        jobs += [(_official(image, split), root / f'{split}2017' / Path(image['file_name']).name) for image in images]
    try:
        for split in files:
            (root / f'{split}2017').mkdir(exist_ok=True)
        with folder_lock(root, 'download into this folder'):
            absent = sum(not path.exists() for _, path in jobs)
            check_space(root, absent * IMAGE_BYTES, f'{absent} images')
            _fetch_all(jobs, progress)
    except OSError as error:
        raise unwritable(root, error) from None
    return subset


def _official(image: dict[str, Any], split: str) -> CocoImage:
    """Where an image is, and how to know that it is whole."""
    name = Path(image['file_name']).name
    sources = tuple(Url(f'{server}{split}2017/{name}') for server in coco_files.SERVERS)
    return CocoImage(name, name, sources, '', '', '', width=image['width'], height=image['height'])


def _fetch_all(jobs: Sequence[tuple[CocoImage, Path]], progress: bool) -> None:
    """Fetch images over several connections; gives up when one after the other fails.

    The threads are left behind when this ends early, so that Ctrl-C need not wait for a server.
    """
    waiting: queue.SimpleQueue[tuple[CocoImage, Path]] = queue.SimpleQueue()
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    stopped = threading.Event()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while not stopped.is_set():
            try:
                image, path = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                _ensure(image, path)
                done.put(None)
            except Exception as error:
                done.put(error)

    for _ in range(min(CONNECTIONS, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    failures: list[PTQSAMError] = []
    in_a_row = 0
    steps = range(len(jobs))
    try:
        for _ in item_bar(steps, 'images', 'image', progress):
            error = done.get()
            in_a_row = in_a_row + 1 if error else 0
            if isinstance(error, PTQSAMError):
                failures.append(error)
            elif error:
                raise error
            if in_a_row == CONNECTIONS:
                break
    finally:
        stopped.set()
    if failures:
        raise AssetError(
            f'{len(failures)} of {len(jobs)} images did not come; what came is kept, run the same command again; the '
            f'first: {failures[0]}'
        )


def _ensure(image: CocoImage, path: Path) -> None:
    """Keep an image that is whole, fetch one that is not."""
    if path.exists():
        if not image.problem(path):
            return
        path.unlink()
    download_file(image, path, progress=False)
