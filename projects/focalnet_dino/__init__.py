"""DINO with FocalNet-L on mmdet and timm, with the names of its official checkpoint; inference only.

Importing this package registers the detector; ``detector='projects.focalnet_dino::dino_focalnet-l_coco.py'`` does so.
"""

from ptqsam.torchvision_compat import ensure_torchvision

ensure_torchvision()

# the imports below need torchvision, and importing them is what registers the parts
from .backbone import FocalNet  # noqa: E402
from .detector import FocalNetDINO, OfficialDINOHead  # noqa: E402

__all__ = ['FocalNet', 'FocalNetDINO', 'OfficialDINOHead']
