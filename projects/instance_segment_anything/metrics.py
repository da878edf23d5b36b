"""Metrics that mmdet lacks: COCO mAP of the images that were run, and mean IoU of prompted masks."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from mmdet.datasets.api_wrappers import COCOeval
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.evaluator import BaseMetric

from .checks import checked_arguments
from .coco import CheckedCOCO
from .masks import encode_masks


@METRICS.register_module()
@checked_arguments('test_evaluator (SubsetCocoMetric)')
class SubsetCocoMetric(CocoMetric):
    """mmdet's ``CocoMetric`` over the images that were run instead of all images of the annotation file.

    Further differences: values are not rounded to three digits, nothing is printed, and no predictions at all are an
    mAP of 0 and no error.

    Args:
        ann_file: instances file in COCO format.
        metric: 'segm', 'bbox' or both.
        kwargs: others of ``CocoMetric``.
    """

    default_prefix = ''  # names stay as they are: segm_mAP

    def __init__(self, ann_file: str, metric: str | Sequence[str] = 'segm', **kwargs: Any) -> None:
        super().__init__(metric=[metric] if isinstance(metric, str) else list(metric), **kwargs)
        self._coco_api = CheckedCOCO(ann_file)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Evaluate.

        Args:
            results: one (ground truth, prediction) pair per image, as ``CocoMetric.process`` collects them.

        Returns:
            For each metric ``<metric>_mAP``, ``_mAP_50``, ``_mAP_75``, ``_mAP_s``, ``_mAP_m``, ``_mAP_l``, in [0, 1];
            -1 where the images hold no such object.
        """
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
        predictions = [prediction for _, prediction in results]
        return {
            f'{metric}_{name}': value
            for metric in self.metrics
            for name, value in self._average_precision(predictions, metric).items()
        }

    def _average_precision(self, predictions: list[dict], metric: str) -> dict[str, float]:
        names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        detections = [item for prediction in predictions for item in self._as_coco(prediction, metric)]
        if not detections:
            return dict.fromkeys(names, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._coco_api, self._coco_api.loadRes(detections), metric)
            evaluation.params.catIds = self.cat_ids
            evaluation.params.imgIds = sorted({prediction['img_id'] for prediction in predictions})
            evaluation.params.maxDets = self.proposal_nums
            evaluation.params.iouThrs = self.iou_thrs
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(names, map(float, evaluation.stats), strict=False))

    def _as_coco(self, prediction: dict, metric: str) -> list[dict]:
        """Predictions of one image in COCO's results format.

        A segm result has no ``bbox``: with one, pycocotools would sort objects into sizes by their boxes.
        """
        common = [
            dict(image_id=prediction['img_id'], category_id=self.cat_ids[label]) for label in prediction['labels']
        ]
        if metric == 'bbox':
            parts = [dict(bbox=self.xyxy2xywh(box)) for box in prediction['bboxes']]
            scores = prediction['scores']
        else:
            parts = [dict(segmentation=mask) for mask in prediction['masks']]
            scores = prediction.get('mask_scores', prediction['scores'])
        return [
            {**item, **part, 'score': float(score)} for item, part, score in zip(common, parts, scores, strict=True)
        ]


@METRICS.register_module()
@checked_arguments('test_evaluator (MaskIoU)')
class MaskIoU(BaseMetric):
    """Mean IoU of the masks that SAM makes, object by object, apart from how the detector ranks them.

    To each ground-truth object that is no crowd belongs the prompt box that overlaps the object's box best; what counts
    is the IoU of that prompt's mask with the object's mask, whatever the label. Objects without a prompt box of at
    least ``min_box_iou`` are left out of the mean, and counted.

    Args:
        min_box_iou: least IoU of prompt box and object box.
        kwargs: those of mmengine's ``BaseMetric``.
    """

    default_prefix = ''

    def __init__(self, min_box_iou: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_box_iou = min_box_iou

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Collect the IoU of every matched object.

        Args:
            data_batch: not used.
            data_samples: with ``gt_instances`` (``bboxes``, ``masks``) and ``pred_instances`` (``bboxes``, ``masks`` as
                run-length codes), both in pixels of the original image.
        """
        for data_sample in data_samples:
            truth, found = data_sample['gt_instances'], data_sample['pred_instances']
            self.results.append((len(truth['bboxes']), self._object_ious(truth, found)))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Average.

        Args:
            results: per image the number of objects and the IoUs of the matched ones.

        Returns:
            ``mask_mIoU``: mean IoU of matched objects, ``mask_matched``: share of objects matched; 0 where there are
            none.
        """
        objects = sum(count for count, _ in results)
        ious = [iou for _, image_ious in results for iou in image_ious]
        return dict(
            mask_mIoU=float(np.mean(ious)) if ious else 0.0, mask_matched=len(ious) / objects if objects else 0.0
        )

    def _object_ious(self, truth: dict, found: dict) -> list[float]:
        if not len(truth['bboxes']) or not len(found['bboxes']):
            return []
        overlap, prompt = bbox_overlaps(truth['bboxes'].cpu(), found['bboxes'].cpu()).max(dim=1)
        matched = (overlap >= self.min_box_iou).nonzero()[:, 0].tolist()
        ious = []
        for index in matched:
            code = encode_masks(torch.from_numpy(truth['masks'].masks[index : index + 1]))
            ious.append(float(coco_mask.iou([found['masks'][prompt[index]]], code, [0])[0, 0]))
        return ious
