"""SAM prompted by the boxes of a detector: an mmdet plug-in (models, detectors, datasets, metrics).

Importing this package registers everything in mmdet's registries; configs do it through ``custom_imports``.
"""

from ptqsam.torchvision_compat import ensure_torchvision

ensure_torchvision()

# the imports below need torchvision, and importing them is what registers the parts
from .box_cache import cached_boxes, load_boxes  # noqa: E402
from .coco import CheckedCocoDataset  # noqa: E402
from .detector_prompted_sam import DetectorPromptedSAM  # noqa: E402
from .masks import decode_masks, encode_masks  # noqa: E402
from .metrics import MaskIoU, SubsetCocoMetric  # noqa: E402
from .oracle import OracleDetector  # noqa: E402
from .prompts import PromptOptions  # noqa: E402
from .sam import ARCHS, SegmentAnything, describe_sam  # noqa: E402
from .tiny_vit import TinyViTEncoder  # noqa: E402
from .transforms import LoadImage, ResizeLongestSide  # noqa: E402

__all__ = [
    'ARCHS',
    'CheckedCocoDataset',
    'DetectorPromptedSAM',
    'LoadImage',
    'MaskIoU',
    'OracleDetector',
    'PromptOptions',
    'ResizeLongestSide',
    'SegmentAnything',
    'SubsetCocoMetric',
    'TinyViTEncoder',
    'cached_boxes',
    'decode_masks',
    'describe_sam',
    'encode_masks',
    'load_boxes',
]
