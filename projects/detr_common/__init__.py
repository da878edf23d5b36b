"""What detectors of the DETR family share that are published under other names than mmdet's."""

from ptqsam.torchvision_compat import ensure_torchvision

ensure_torchvision()

# the import below needs torchvision
from .head import ENCODER_CLASSES, OfficialHead  # noqa: E402
from .names import COCO_IDS, Rule, input_projections, to_mmdet, two_stage_transformer, used_classes  # noqa: E402

__all__ = [
    'COCO_IDS',
    'ENCODER_CLASSES',
    'OfficialHead',
    'Rule',
    'input_projections',
    'to_mmdet',
    'two_stage_transformer',
    'used_classes',
]
