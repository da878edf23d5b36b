"""What tests of the projects build from: a tiny SAM, its data preprocessor, data samples."""

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from projects.instance_segment_anything import DetectorPromptedSAM
from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from tests.tiny import ARCH

PREPROCESSOR = dict(
    type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
)
ORACLE = dict(type='OracleDetector')


def make_model(size=64, arch=ARCH, detector=ORACLE, seed=0, **test_cfg):
    """A model with random weights, in eval mode."""
    torch.manual_seed(seed)
    sam = dict(type='SegmentAnything', arch=arch, image_size=size)
    preprocessor = dict(PREPROCESSOR, pad_size_divisor=size)
    return DetectorPromptedSAM(detector, sam, test_cfg=test_cfg, data_preprocessor=preprocessor).eval()


def instances(boxes, scores=None, labels=None):
    """Boxes as InstanceData, score 1 and label 0 unless given."""
    bboxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(bboxes)
    return InstanceData(
        bboxes=bboxes,
        scores=torch.ones(count) if scores is None else torch.tensor(scores, dtype=torch.float32),
        labels=torch.zeros(count, dtype=torch.long) if labels is None else torch.tensor(labels, dtype=torch.long),
    )


def random_boxes(count, height, width, seed=0):
    """(N, 4) xyxy inside an image."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 1], dim=1)


def make_sample(proposals=None, **metainfo):
    """A data sample, with proposals where given."""
    sample = DetDataSample(metainfo=metainfo)
    if proposals is not None:
        sample.proposals = proposals
    return sample


def detector_on_meta(name, **backbone):
    """A detector by the name of its config, with changed settings of its backbone, without memory for its weights."""
    config = MMDetDetector(name).resolve()[0]
    config['backbone'].update(backbone)
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        return MODELS.build(ConfigDict(config)).eval()
