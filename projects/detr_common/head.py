"""What the heads of official DETR checkpoints do otherwise than mmdet's."""

from collections.abc import Mapping
from typing import Any

from mmcv.cnn import Linear
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor

ENCODER_CLASSES = 91


class OfficialHead:
    """Mixin for mmdet's ``DeformableDETRHead`` and heads derived from it, for inference.

    The class head that ranks the encoder's tokens keeps all 91 outputs of the checkpoint: Deformable DETR ranks by
    output 0, which is no category, DINO by the largest of all. And boxes may reach beyond the image, as in the
    original; mmdet clips them, and a clipped box is another prompt.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.cls_branches[-1] = Linear(self.embed_dims, ENCODER_CLASSES)

    def _predict_by_feat_single(
        self, cls_score: Tensor, bbox_pred: Tensor, img_meta: Mapping[str, Any], rescale: bool = True
    ) -> InstanceData:
        """The best pairs of query and class of one image.

        Args:
            cls_score: (queries, classes) logits.
            bbox_pred: (queries, 4) cxcywh, relative to the image without padding.
            img_meta: ``img_shape`` (height, width) of the network's image and, to rescale, its ``scale_factor``.
            rescale: boxes in pixels of the original image, else in those of the network's.

        Returns:
            ``bboxes`` (N, 4) xyxy, ``scores`` (N,), ``labels`` (N,), best first; N is ``test_cfg.max_per_img``.
        """
        scores, pairs = cls_score.sigmoid().flatten().topk(self.test_cfg['max_per_img'])
        height, width = img_meta['img_shape'][:2]
        boxes = bbox_cxcywh_to_xyxy(bbox_pred[pairs // self.num_classes])
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        if rescale:
            boxes = boxes / boxes.new_tensor(img_meta['scale_factor']).repeat(2)
        return InstanceData(bboxes=boxes, scores=scores, labels=pairs % self.num_classes)
