"""A detector that knows the truth: ground-truth boxes as prompts."""

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData

from ptqsam.errors import ConfigError

from .checks import check_kind, checked_arguments


@MODELS.register_module()
@checked_arguments('model.detector')
class OracleDetector:
    """Prompts with the boxes of the annotations, in their order, without crowds, each with score 1.

    Args:
        jitter: every side of a box is moved by up to this share of the box's width or height, in [0, 0.5).
        seed: of the jitter; an image's jitter depends on this and the image id alone.
    """

    from_annotations = True  # nothing to compute, nothing to cache

    def __init__(self, jitter: float = 0.0, seed: int = 0) -> None:
        check_kind('model.detector.jitter', jitter, 0.1)
        check_kind('model.detector.seed', seed, 0)
        if not 0 <= jitter < 0.5:
            raise ConfigError(f'model.detector.jitter={jitter} is out of range; choose 0 to 0.5, for example 0.1')
        self.jitter = jitter
        self.seed = seed

    def identity(self) -> dict[str, float]:
        """What the boxes depend on, beside the annotations."""
        return dict(jitter=self.jitter, seed=self.seed)

    def detect(self, data_sample: DetDataSample, device: torch.device) -> InstanceData:
        """Take the boxes of the annotations.

        Args:
            data_sample: with ``gt_instances`` in pixels of the original image, and metainfo ``img_id``, ``ori_shape``.
            device: where the boxes are wanted.

        Returns:
            ``bboxes`` (N, 4) xyxy in pixels of the original image, ``scores`` (N,), ``labels`` (N,).

        Raises:
            ConfigError: the pipeline does not load annotations.
        """
        truth = data_sample.get('gt_instances')
        if truth is None or 'bboxes' not in truth:
            raise ConfigError(
                "OracleDetector needs ground-truth boxes: add dict(type='LoadAnnotations', with_bbox=True) "
                'to the pipeline, after the resizing'
            )
        boxes = get_box_tensor(truth.bboxes).to(device, torch.float32)
        if self.jitter:
            boxes = boxes + self._offsets(boxes.cpu().numpy(), data_sample.img_id).to(device)
            height, width = data_sample.ori_shape
            boxes = boxes.minimum(boxes.new_tensor([width, height, width, height])).clamp(min=0)
        return InstanceData(bboxes=boxes, scores=boxes.new_ones(len(boxes)), labels=truth.labels.to(device))

    def _offsets(self, boxes: np.ndarray, img_id: int) -> torch.Tensor:
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        random = np.random.default_rng([self.seed, img_id]).uniform(-self.jitter, self.jitter, boxes.shape)
        return torch.from_numpy((random * sides).astype(np.float32))
