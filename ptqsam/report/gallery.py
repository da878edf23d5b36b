"""Pictures of what quantization does to masks: ground truth, FP32 and quantized side by side."""

import colorsys
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from ptqsam.errors import AssetError
from ptqsam.fileio import atomic_path, write_json

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample

# COCO run-length encoding of one mask: {'size': [H, W], 'counts': bytes or str}
Rle = dict[str, Any]

# of a detector's many boxes only the confident ones are drawn
SCORE_THRESHOLD = 0.3
# a ground truth object has the colour of the prompt box that overlaps it at least so much
SAME_OBJECT_IOU = 0.5

# pixels: longest side of a panel; least width, for the caption; caption; gap between panels
PANEL_SIZE, PANEL_WIDTH, CAPTION, GAP = 640, 360, 46, 8
FILL_OPACITY = 0.45
JPEG_QUALITY = 92
# in the folder of the pictures: what is on them, the worst first
INDEX = 'index.json'


@dataclass(frozen=True)
class Objects:
    """The objects of one panel.

    Attributes:
        masks: run-length encoded, at the size of the image.
        boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the image.
        index: which of the `total` predictions these are, int (n,).
        total: predictions before weak ones were left out.
    """

    masks: list[Rle]
    boxes: np.ndarray
    index: np.ndarray
    total: int

    def plain(self) -> dict[str, Any]:
        """The same in values for JSON."""
        return dict(
            masks=[{**mask, 'counts': _text(mask['counts'])} for mask in self.masks],
            boxes=self.boxes.tolist(),
            index=self.index.tolist(),
            total=self.total,
        )

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> 'Objects':
        """Inverse of `plain`."""
        boxes = np.array(values['boxes'], np.float32).reshape(-1, 4)
        return cls(values['masks'], boxes, np.array(values['index'], np.int64), values['total'])


class Gallery:
    """Draws some of the evaluated images, evenly spread over the dataset.

    Args:
        show_dir: folder for the pictures, one `<image stem>.jpg` each.
        dataset: mmdet `CocoDataset` (or a wrapper with its `get_data_info`) that is evaluated.
        max_images: at most this many pictures.

    Attributes:
        entries: file written so far -> its entry in `index.json`.
    """

    def __init__(self, show_dir: Path, dataset: Any, max_images: int = 50) -> None:
        self.show_dir = Path(show_dir)
        self.dataset = dataset
        size = len(dataset)
        chosen = np.linspace(0, size - 1, min(size, max_images)).round().astype(int).tolist()
        self._chosen = {dataset.get_data_info(index)['img_path']: index for index in chosen}
        self._float: dict[str, Objects] = {}
        self.entries: dict[Path, dict[str, Any]] = {}

    @property
    def pictures(self) -> list[Path]:
        """Files written so far."""
        return list(self.entries)

    def add(self, what: str, data_samples: Sequence['DetDataSample']) -> None:
        """Take the results of one batch; with those of the quantized model the pictures are written.

        Args:
            what: 'fp' or 'quant'. All 'fp' results come before the first 'quant', or none do, and then the pictures
                have no panel for them.
            data_samples: results with `img_path` and `pred_instances`, whose `masks` are bool (N, H, W) or N
                run-length encodings, N boxes and scores. Both models have the same boxes in the same order.

        Raises:
            AssetError: the image cannot be read (any more).
        """
        for sample in data_samples:
            if sample.img_path not in self._chosen:
                continue
            if what == 'fp':
                self._float[sample.img_path] = predicted_objects(sample.pred_instances)
            else:
                self._write(sample.img_path, self._float.pop(sample.img_path, None), sample.pred_instances)

    def finish(self) -> None:
        """Know the pictures of all processes, and list them in `index.json`, those with the worst masks first."""
        self.entries = {path: entry for entries in all_gather_object(self.entries) for path, entry in entries.items()}
        if self.entries and is_main_process():
            # without a float mask to compare with they stand at the end
            entries = sorted(
                self.entries.values(), key=lambda entry: math.inf if entry['fp_iou'] is None else entry['fp_iou']
            )
            write_json(self.show_dir / INDEX, entries)

    @property
    def images(self) -> set[str]:
        """Paths of the images that are drawn."""
        return set(self._chosen)

    def float_results(self) -> dict[str, Any]:
        """What `add` has got of the float model, from all processes, in plain values: path of an image -> objects."""
        everyone = itertools.chain(*(found.items() for found in all_gather_object(self._float)))
        return {path: objects.plain() for path, objects in everyone}

    def take_float_results(self, results: dict[str, Any]) -> None:
        """Go on as if `add` had got the results of the float model; other images than the drawn ones do not matter."""
        self._float = {path: Objects.from_plain(objects) for path, objects in results.items()}

    def _write(self, img_path: str, reference: Objects | None, instances: Any) -> None:
        """Write the picture of one image.

        Args:
            img_path: the image.
            reference: objects of the float model if it was evaluated.
            instances: predictions of the quantized model.
        """
        quantized = predicted_objects(instances)
        image = read_image(img_path)
        truth = true_objects(self.dataset.get_data_info(self._chosen[img_path]))
        panels = [panel(image, truth, match_colours(truth.boxes, quantized), 'Ground truth', count_of(truth))]
        note, ious = count_of(quantized), []
        if reference is not None:
            panels.append(panel(image, reference, reference.index, 'FP32', count_of(reference)))
            assert np.array_equal(reference.boxes, quantized.boxes), f'{img_path}: prompt boxes changed during the run'
            if ious := object_ious(reference, quantized):
                note += f', mean IoU with FP32 {np.mean(ious):.2f}'
        panels.append(panel(image, quantized, quantized.index, 'Quantized', note))
        gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
        row = [piece for part in panels for piece in (gap, part)][1:]
        path = self.show_dir / f'{Path(img_path).stem}.jpg'
        with atomic_path(path) as temporary:
            # without chroma subsampling: it smears thin coloured contours
            Image.fromarray(np.hstack(row)).save(temporary, 'JPEG', quality=JPEG_QUALITY, subsampling=0)
        self.entries[path] = dict(
            file=path.name,
            image=Path(img_path).name,
            fp_iou=float(np.mean(ious)) if ious else None,
            objects=len(quantized.masks),
            worst=min(ious, default=None),
        )


def _text(counts: str | bytes) -> str:
    return counts if isinstance(counts, str) else counts.decode()


def read_image(path: str) -> np.ndarray:
    """An image as the models saw it, uint8 RGB (H, W, 3).

    Raises:
        AssetError: it cannot be read (any more).
    """
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert('RGB'))
    except OSError as error:
        reason = ' '.join(str(error).split())
        raise AssetError(f'{path}: cannot read this image for a picture ({reason}); fetch the file again') from None


def predicted_objects(instances: Any) -> Objects:
    """Predictions worth drawing, with compact masks: those of boxes that the detector is sure of.

    Args:
        instances: `pred_instances` of a data sample; `scores` are the detector's.

    Returns:
        The chosen predictions; the same ones for the float and the quantized model.
    """
    index = torch.nonzero(instances.scores >= SCORE_THRESHOLD).flatten().cpu().numpy()
    masks = [to_rle(instances.masks[i]) for i in index.tolist()]
    boxes = instances.bboxes.detach().float().cpu().numpy()[index]
    return Objects(masks, boxes, index, len(instances.scores))


def true_objects(info: dict[str, Any]) -> Objects:
    """Ground truth of an image without its crowd regions, which nobody is asked to segment.

    Args:
        info: `get_data_info` of a `CocoDataset`: height, width, instances with bbox, mask (polygons or run-length
            encoding) and ignore_flag.

    Returns:
        The annotated objects.
    """
    instances = [one for one in info['instances'] if not one['ignore_flag'] and 'mask' in one]
    masks = [annotated_mask(one['mask'], info['height'], info['width']) for one in instances]
    boxes = np.array([one['bbox'] for one in instances], np.float32).reshape(-1, 4)
    return Objects(masks, boxes, np.arange(len(masks)), len(masks))


def annotated_mask(mask: list | Rle, height: int, width: int) -> Rle:
    """Compressed encoding of an annotation: polygons, or run lengths as a list of numbers or compressed."""
    if isinstance(mask, list):
        return coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
    return coco_mask.frPyObjects(mask, height, width) if isinstance(mask['counts'], list) else mask


def to_rle(mask: Any) -> Rle:
    """Run-length encoding of a bool tensor (H, W); an encoding is passed through."""
    if isinstance(mask, dict):
        return mask
    return coco_mask.encode(np.asfortranarray(mask.detach().cpu().numpy().astype(np.uint8)))


def object_ious(first: Objects, second: Objects) -> list[float]:
    """Intersection over union of two models' masks for the same boxes, of each; two empty masks agree."""
    ious = []
    for a, b in zip(first.masks, second.masks, strict=True):
        union = float(coco_mask.area(coco_mask.merge([a, b])))
        ious.append(float(coco_mask.area(coco_mask.merge([a, b], intersect=True))) / union if union else 1.0)
    return ious


def match_colours(boxes: np.ndarray, predicted: Objects) -> np.ndarray:
    """Colour numbers for ground truth objects: that of the prompt box around the same object, else unused ones.

    Args:
        boxes: ground truth boxes, (n, 4).
        predicted: predictions, whose colours are their `index`.

    Returns:
        Int (n,).
    """
    colours = np.arange(len(boxes)) + predicted.total
    if len(boxes) and len(predicted.boxes):
        xywh = [np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]).astype(np.float64) for b in (boxes, predicted.boxes)]
        ious = coco_mask.iou(*xywh, [0] * len(predicted.boxes))
        for row, column in zip(*linear_sum_assignment(ious, maximize=True), strict=True):
            if ious[row, column] >= SAME_OBJECT_IOU:
                colours[row] = predicted.index[column]
    return colours


def panel(image: np.ndarray, objects: Objects, colours: np.ndarray, title: str, note: str) -> np.ndarray:
    """One panel: caption above, image with masks below.

    Args:
        image: uint8 RGB (H, W, 3).
        objects: what to draw.
        colours: colour number of each object, int (n,).
        title: first line of the caption.
        note: second line.

    Returns:
        uint8 RGB (h + caption, w, 3).
    """
    height, width = image.shape[:2]
    scale = min(PANEL_SIZE / max(height, width), 1.0)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = image.copy() if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    areas = coco_mask.area(objects.masks) if objects.masks else np.zeros(0)
    # small objects last, else a large one around them covers them
    for i in np.argsort(-areas.astype(np.int64), kind='stable').tolist():
        draw_object(canvas, objects.masks[i], objects.boxes[i] * scale, colour(int(colours[i])))
    framed = Image.new('RGB', (max(size[0], PANEL_WIDTH), size[1] + CAPTION), 'white')
    framed.paste(Image.fromarray(canvas), (0, CAPTION))
    pen = ImageDraw.Draw(framed)
    pen.text((2, 3), title, 'black', ImageFont.load_default(17))
    pen.text((2, 25), note, (90, 90, 90), ImageFont.load_default(14))
    return np.asarray(framed)


def draw_object(canvas: np.ndarray, mask: Rle, box: np.ndarray, rgb: tuple[int, int, int]) -> None:
    """Draw a translucent mask with its contour; where the mask is empty, the prompt box, so that the failure shows.

    Args:
        canvas: uint8 RGB (h, w, 3), drawn on.
        mask: encoding at the size of the image.
        box: x1 y1 x2 y2 in pixels of the canvas.
        rgb: colour.
    """
    pixels = coco_mask.decode(mask)
    if pixels.shape != canvas.shape[:2]:
        resized = cv2.resize(pixels * 255, canvas.shape[1::-1], interpolation=cv2.INTER_AREA)
        pixels = (resized > 127).astype(np.uint8)
    x, y, w, h = cv2.boundingRect(pixels)
    if w == 0:
        left, top, right, bottom = np.round(box).astype(int).tolist()
        cv2.rectangle(canvas, (left, top), (right, bottom), rgb, 1, cv2.LINE_AA)
        return
    region, inside = canvas[y : y + h, x : x + w], pixels[y : y + h, x : x + w].astype(bool)
    region[inside] = (region[inside] * (1 - FILL_OPACITY) + np.array(rgb) * FILL_OPACITY).astype(np.uint8)
    contours, _ = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, contours, -1, rgb, 1, cv2.LINE_AA)


def colour(number: int) -> tuple[int, int, int]:
    """RGB of a colour number; hues of neighbours are a golden angle apart and so never alike. Pink is first: it is rare
    in photographs."""
    hue = (0.93 + number * 0.618034) % 1
    saturation, value = ((0.9, 1.0), (0.6, 1.0), (1.0, 0.75))[number // 8 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def count_of(objects: Objects) -> str:
    """Number of objects, and of how many if weak ones were left out."""
    shown, text = len(objects.masks), f'{objects.total} object{"" if objects.total == 1 else "s"}'
    return text if shown == objects.total else f'{shown} of {text} (score over {SCORE_THRESHOLD})'
