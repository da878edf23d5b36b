"""H-Deformable-DETR on mmdet, with the names of its official checkpoints; inference only.

Importing this package registers the detector; ``detector='projects.hdetr::hdetr_r50_coco.py'`` does so.
"""

from ptqsam.torchvision_compat import ensure_torchvision

ensure_torchvision()

# the import below needs torchvision, and importing it is what registers the parts
from .detector import HDeformableDETR, HDETRHead  # noqa: E402

__all__ = ['HDETRHead', 'HDeformableDETR']
