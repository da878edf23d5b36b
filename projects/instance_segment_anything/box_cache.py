"""Detector boxes, computed once per detector, weights and annotation file, and kept as COCO-format results."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures import DetDataSample
from mmengine.dist import barrier, is_main_process
from mmengine.structures import InstanceData

from ptqsam.errors import AssetError, ConfigError
from ptqsam.fileio import fingerprint, sha256_file, write_json
from ptqsam.progress import progress

from .mmdet_detector import MMDetDetector
from .oracle import OracleDetector
from .prompts import PromptOptions

_FORMAT = 'ptqsam boxes 1'
# generous, because score threshold and number of boxes are applied when the boxes are used
_MIN_SCORE = 0.01
_MAX_BOXES = 300

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]


def cached_boxes(detector: MMDetDetector, dataset: Any, cache_dir: str | Path, device: torch.device) -> Path:
    """Make sure that the boxes of all images of a dataset lie on disk; run the detector only where they do not.

    Args:
        detector: gives the boxes; its memory is given back afterwards.
        dataset: an mmdet ``CocoDataset``, whole or a subset; images that earlier runs left out are added to the file.
        cache_dir: folder for the file.
        device: where the detector runs.

    Returns:
        The file. Its name and content depend on the detector's config, pipeline and weights, and on the annotation
        file and the classes of the dataset. ``detections`` in it is a list in COCO's results format.

    Raises:
        AssetError: an image is missing or broken, the weights do not fit, or the file was tampered with.
        ConfigError: the detector knows more classes than the dataset.
    """
    made_with = dict(
        detector=detector.identity(),
        annotations=sha256_file(dataset.ann_file),
        classes=list(dataset.metainfo['classes']),
        category_ids=[int(number) for number in dataset.cat_ids],
    )
    key = fingerprint(made_with)
    path = Path(cache_dir) / f'boxes_{Path(dataset.ann_file).stem}_{key}.json'
    if is_main_process():
        content = _read(path, key) if path.exists() else _new_content(key, made_with)
        images = [dataset.get_data_info(index) for index in range(len(dataset))]
        done = set(content['image_ids'])
        missing = [image for image in images if image['img_id'] not in done]
        if missing:
            for image in progress(missing, 'detect boxes', 'image'):
                sample = DetDataSample(metainfo={name: image[name] for name in ('img_id', 'img_path')})
                content['detections'] += _as_coco(detector.detect(sample, device), image, made_with['category_ids'])
                content['image_ids'].append(image['img_id'])
            detector.release()
            content['sha256'] = _checksum(content)
            write_json(path, content, indent=None)
    barrier()
    return path


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
    for image_id in content['image_ids']:
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


def _new_content(key: str, made_with: dict[str, Any]) -> dict[str, Any]:
    return dict(format=_FORMAT, fingerprint=key, made_with=made_with, image_ids=[], detections=[])


def _read(path: Path, key: str | None = None) -> dict[str, Any]:
    """Read and check a file; with ``key``, also that it was made for these conditions."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        sound = content['format'] == _FORMAT and content['sha256'] == _checksum(content)
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
    found = PromptOptions(score_thr=_MIN_SCORE, max_boxes=_MAX_BOXES).select(found).cpu()
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
