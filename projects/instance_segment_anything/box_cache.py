"""Detector boxes, computed once per detector, weights, annotation file and images, kept as COCO-format results."""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures import DetDataSample
from mmengine.dist import all_gather_object, barrier, get_dist_info, is_main_process
from mmengine.structures import InstanceData

from ptqsam.distributed import decided_by_main, demand_same
from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import fingerprint, folder_lock, sha256_file, write_json
from ptqsam.progress import progress_bar

from .mmdet_detector import MMDetDetector
from .oracle import OracleDetector
from .prompts import PromptOptions

_FORMAT = 'ptqsam boxes 3'
_OLDER = ('ptqsam boxes 2',)  # without boxes of low scores
# generous, because score threshold and number of boxes are applied when the boxes are used
_MAX_BOXES = 300
# images that each of several processes looks at before they bring together what they found
_IMAGES_PER_TURN = 8
# seconds between writes while the detector runs: what an interruption can cost
_SAVE_EVERY = 60.0
# and at least so many times as long as a write takes
_WORK_PER_WRITE = 20.0

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]


def cached_boxes(detector: MMDetDetector, dataset: Any, cache_dir: str | Path, device: torch.device) -> Path:
    """Make sure that the boxes of all images of a dataset lie on disk; run the detector only where they do not.

    Of several processes each detects in its share of the images, and the main process writes: the same file as one
    process would.

    Args:
        detector: gives the boxes; its memory is given back afterwards.
        dataset: an mmdet ``CocoDataset``, whole or a subset; images that earlier runs left out are added to the file.
        cache_dir: folder for the file.
        device: where the detector runs.

    Returns:
        The file. Its name and content depend on the detector's config, pipeline and weights, and on the annotation
        file, the classes and the image folder of the dataset; boxes of an image whose file has another size than when
        they were found are found again. ``detections`` in it is a list in COCO's results format. What has been found is
        written about every minute, and when the work ends early, unless it is another process that fails.

    Raises:
        AssetError: an image is missing or broken, the weights do not fit, or the file was tampered with.
        ConfigError: the detector knows other classes than the dataset, or the folder cannot be written.
    """
    _check_classes(detector, dataset)
    path, key, made_with = _place(detector, dataset, cache_dir)
    demand_same(dict(boxes=key))
    content: dict[str, Any] = {}  # in the main process
    with ExitStack() as stack:

        def open_file() -> list[dict[str, Any]]:
            content.update(_content(path, key, made_with))
            if not _missing(content, dataset):
                return []
            _check_writable(path.parent)
            # only one run detects; one that waited finds the boxes of the other
            stack.enter_context(folder_lock(path.parent, 'detection of boxes for this folder'))
            content.update(_content(path, key, made_with))
            if not content['images']:
                _say_why(path, made_with)
            return _missing(content, dataset)

        missing = decided_by_main(open_file)
        if missing:
            _detect_missing(detector, missing, path, content, made_with['category_ids'], device)
    return path


def known_boxes(detector: MMDetDetector, dataset: Any, cache_dir: str | Path) -> dict[int, Boxes] | None:
    """What `load_boxes` returns, if the boxes of all images of a dataset are on disk, else None; see `cached_boxes`."""
    path, key, made_with = _place(detector, dataset, cache_dir)
    return None if _missing(_content(path, key, made_with), dataset) else load_boxes(path)


def check_limits(options: PromptOptions) -> None:
    """Refuse options that ask for more boxes than a file of `cached_boxes` keeps.

    Raises:
        ConfigError: names the limit.
    """
    if options.max_boxes > _MAX_BOXES:
        raise ConfigError(
            f'model.test_cfg.max_boxes={options.max_boxes} is too large: of a detector, the best {_MAX_BOXES} boxes of '
            f'an image are kept; use {_MAX_BOXES} or less'
        )


def load_boxes(path: str | Path) -> dict[int, Boxes]:
    """Read a file of ``cached_boxes``.

    Args:
        path: the file.

    Returns:
        Image id -> boxes (N, 4) float32 xyxy in pixels of the original image, scores (N,) float32, labels (N,) int64,
        best first; N may be 0.

    Raises:
        AssetError: missing, not such a file, or changed since it was written.
    """
    content = _read(Path(path))
    labels = {number: label for label, number in enumerate(content['made_with']['category_ids'])}
    rows: dict[int, list] = defaultdict(list)
    for found in content['detections']:
        x, y, width, height = found['bbox']
        rows[found['image_id']].append((x, y, x + width, y + height, found['score'], labels[found['category_id']]))
    boxes = {}
    for image_id in (image['id'] for image in content['images']):
        table = np.array(rows[image_id], dtype=np.float64).reshape(-1, 6)
        boxes[image_id] = (table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(int))
    return boxes


class CachedBoxes:
    """A detector that looks its boxes up in a file of ``cached_boxes``."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.boxes = load_boxes(path)

    def detect(self, data_sample: DetDataSample, device: torch.device) -> InstanceData:
        """Boxes of one image, see ``MMDetDetector.detect``; only ``img_id`` is read."""
        if data_sample.img_id not in self.boxes:
            raise AssetError(f'{self.path}: holds no boxes of image {data_sample.img_id}; delete this file')
        bboxes, scores, labels = (torch.from_numpy(array).to(device) for array in self.boxes[data_sample.img_id])
        return InstanceData(bboxes=bboxes, scores=scores, labels=labels)


class AttachBoxes(BaseTransform):
    """Last step of an image pipeline: give the packed data sample its prompt boxes as ``proposals``.

    It comes after ``PackDetInputs``, which packs boxes and scores but loses their labels.

    Args:
        source: where the boxes come from.
        options: which of them are used.
    """

    def __init__(self, source: OracleDetector | CachedBoxes, options: PromptOptions) -> None:
        self.source = source
        self.options = options

    def transform(self, results: dict) -> dict:
        """Set ``proposals``: ``bboxes`` (N, 4) xyxy in pixels of the original image, ``scores``, ``labels``."""
        data_sample = results['data_samples']
        data_sample.proposals = self.options.select(self.source.detect(data_sample, torch.device('cpu')))
        return results


def _place(detector: MMDetDetector, dataset: Any, cache_dir: str | Path) -> tuple[Path, str, dict[str, Any]]:
    """The file for a detector and a dataset; what its boxes depend on, beside the single images, in short and long."""
    made_with = dict(
        detector=detector.identity(),
        annotations=sha256_file(dataset.ann_file),
        classes=list(dataset.metainfo['classes']),
        category_ids=[int(number) for number in dataset.cat_ids],
        # relative, so that a data set may be moved
        folder=os.path.relpath(dataset.data_prefix.get('img') or '.', dataset.data_root or '.'),
    )
    made_with = json.loads(json.dumps(made_with))  # as it will be read: lists in place of tuples
    key = fingerprint(made_with)
    return Path(cache_dir) / f'boxes_{Path(dataset.ann_file).stem}_{key}.json', key, made_with


def _content(path: Path, key: str, made_with: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or what a new one begins with."""
    if path.exists():
        content = _read(path, key)
        if content['format'] == _FORMAT:
            return content
    return dict(format=_FORMAT, fingerprint=key, made_with=made_with, images=[], detections=[])


def _missing(content: dict[str, Any], dataset: Any) -> list[dict[str, Any]]:
    """Images of a dataset whose boxes are not there, or were found in a file of another size."""
    done = {image['id']: image['bytes'] for image in content['images']}
    images = [dataset.get_data_info(index) for index in range(len(dataset))]
    return [
        image for image in images if image['img_id'] not in done or done[image['img_id']] != _size(image['img_path'])
    ]


def _size(path: str) -> int | None:
    """Bytes of an image; None where there is none, which the detector has to say."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _detect_missing(
    detector: MMDetDetector,
    missing: list[dict[str, Any]],
    path: Path,
    content: dict[str, Any],
    category_ids: list[int],
    device: torch.device,
) -> None:
    """Add what the detector finds in images that are missing, and write the file, however this ends."""
    rank, world_size = get_dist_info()
    # an image and its boxes in one append: an interruption cannot part them
    fresh: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if is_main_process():
        content = _without(content, missing)
    next_save = time.monotonic() + _SAVE_EVERY
    # one process writes what it has after every image; several bring their images together from time to time
    turn = 1 if world_size == 1 else world_size * _IMAGES_PER_TURN
    try:
        with progress_bar(len(missing), 'detect boxes', 'image') as bar:
            for start in range(0, len(missing), turn):
                images = missing[start : start + turn]
                own = [_detect(detector, image, category_ids, device) for image in images[rank::world_size]]
                shares = all_gather_object(own)
                if is_main_process():
                    fresh += [shares[number % world_size][number // world_size] for number in range(len(images))]
                    if (start_of_write := time.monotonic()) >= next_save:
                        _write(path, content, fresh)
                        # the boxes of a whole data set take half a minute
                        next_save = time.monotonic() + max(
                            _SAVE_EVERY, _WORK_PER_WRITE * (time.monotonic() - start_of_write)
                        )
                bar.update(len(images))
    finally:
        detector.release()
        if fresh:
            _write(path, content, fresh)
    barrier()  # the others read what the main process has written


def _detect(
    detector: MMDetDetector, image: dict[str, Any], category_ids: list[int], device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is kept of an image, and of what is found in it."""
    listed = dict(id=image['img_id'], bytes=_size(image['img_path']))
    sample = DetDataSample(metainfo={name: image[name] for name in ('img_id', 'img_path')})
    return listed, _as_coco(detector.detect(sample, device), image, category_ids)


def _without(content: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """A file's content without some images, whose boxes are found again."""
    stale = {image['img_id'] for image in images}
    return {
        **content,
        'images': [image for image in content['images'] if image['id'] not in stale],
        'detections': [found for found in content['detections'] if found['image_id'] not in stale],
    }


def _check_classes(detector: MMDetDetector, dataset: Any) -> None:
    """Refuse a detector that was trained for other classes than the dataset has.

    Raises:
        ConfigError: their numbers differ.
    """
    known, wanted = detector.num_classes(), len(dataset.metainfo['classes'])
    if known is not None and known != wanted:
        raise ConfigError(
            f'model.detector: knows {known} classes, but {dataset.ann_file} is read with {wanted}, so labels would not '
            'mean the same; use a detector that was trained for this dataset, or OracleDetector'
        )


def _say_why(path: Path, made_with: dict[str, Any]) -> None:
    """Say why boxes of this annotation file that are there already are of no use."""
    names = dict(annotations='other annotations', classes='other classes')
    for other in sorted(path.parent.glob(f'{path.name.rpartition("_")[0]}_*.json')):
        try:
            with open(other, encoding='utf-8') as file:
                start = file.read(1 << 20)  # what stands before the boxes
            header = json.loads(start[: start.index(', "images": [')] + '}')
            theirs, ours = header['made_with']['detector'], made_with['detector']
            reasons = [words for name, words in names.items() if header['made_with'][name] != made_with[name]]
            same_weights, same_model = theirs['weights'] == ours['weights'], theirs['model'] == ours['model']
            older = header['format'] != _FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if theirs != ours and not same_weights and not same_model:
            continue  # of another detector nobody expects boxes
        if theirs != ours and same_weights:
            reasons.insert(0, 'these weights with another config or threshold')
        elif theirs != ours:
            reasons.insert(0, 'this detector with other weights or another pipeline')
        if older:
            reasons.insert(0, 'an older version of this program')
        print(f'{other}: boxes of {" and ".join(reasons) or "other images"}; detecting anew', file=sys.stderr)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before the detector runs.

    Raises:
        ConfigError: names the knob.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error.strerror) from None


def _write(path: Path, content: dict[str, Any], fresh: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
    """Write what was there and what was found since."""
    content = {
        **content,
        'images': content['images'] + [image for image, _ in fresh],
        'detections': content['detections'] + [item for _, found in fresh for item in found],
    }
    content['sha256'] = _checksum(content)
    try:
        write_json(path, content, indent=None)
    except (OSError, ConfigError) as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, reason: Any) -> ConfigError:
    return ConfigError(f'{folder}: cannot keep detector boxes here ({reason}); set PTQSAM_CACHE to another folder')


def _read(path: Path, key: str | None = None) -> dict[str, Any]:
    """Read and check a file; with ``key``, also that it was made for these conditions."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        sound = content['format'] in (_FORMAT, *_OLDER) and content['sha256'] == _checksum(content)
    except FileNotFoundError:
        raise AssetError(f'{path}: no such file of cached boxes; run the detector again') from None
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise AssetError(f'{path}: is no file of cached boxes, or was changed since; delete it')
    if key is not None and content['fingerprint'] != key:
        raise AssetError(f'{path}: boxes of another detector or dataset under this name; delete it')
    return content


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps({name: value for name, value in content.items() if name != 'sha256'}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_coco(found: InstanceData, image: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format, best first."""
    found = PromptOptions(score_thr=0.0, max_boxes=_MAX_BOXES).select(found).cpu()
    if len(found) and int(found.labels.max()) >= len(category_ids):
        raise ConfigError(
            f'model.detector: found class {int(found.labels.max())}, but the dataset has {len(category_ids)} classes; '
            'use a detector that was trained for this dataset, or OracleDetector'
        )
    # in double precision the corner x + width comes back as the same float32
    corners, scores, labels = found.bboxes.double().tolist(), found.scores.double().tolist(), found.labels.tolist()
    return [
        dict(image_id=image['img_id'], bbox=[x1, y1, x2 - x1, y2 - y1], score=score, category_id=category_ids[label])
        for (x1, y1, x2, y2), score, label in zip(corners, scores, labels, strict=True)
    ]
