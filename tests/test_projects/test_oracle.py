"""The detector that knows the truth."""

import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes

from projects.instance_segment_anything import OracleDetector
from ptqsam.errors import ConfigError
from tests.test_projects.helpers import instances, make_sample, random_boxes

CPU = torch.device('cpu')


def truth_sample(boxes, img_id=3):
    sample = make_sample(img_id=img_id, ori_shape=(48, 70))
    sample.gt_instances = instances(boxes, labels=list(range(len(boxes))))
    return sample


@pytest.mark.parametrize('wrap', [HorizontalBoxes, torch.as_tensor])
def test_true_boxes_in_their_order(wrap):
    boxes = random_boxes(4, 48, 70)
    sample = truth_sample(boxes)
    sample.gt_instances.bboxes = wrap(boxes)
    found = OracleDetector().detect(sample, CPU)
    assert torch.equal(found.bboxes, boxes)
    assert found.scores.tolist() == [1.0] * 4
    assert found.labels.tolist() == [0, 1, 2, 3]


def test_jitter_is_bounded_and_stays_inside_the_image():
    boxes = random_boxes(200, 48, 70)
    found = OracleDetector(jitter=0.2).detect(truth_sample(boxes), CPU).bboxes
    moved = (found - boxes).abs()
    limit = 0.2 * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    assert (moved <= limit.clamp(min=1) + 1e-4).all()  # helpers' boxes may stand out of the image by one pixel
    assert moved.mean() > 0.05 * (boxes[:, 2:] - boxes[:, :2]).mean()
    assert (found >= 0).all()
    assert (found <= torch.tensor([70, 48, 70, 48])).all()
    assert (found[:, 2:] >= found[:, :2]).all()


def test_jitter_depends_on_seed_and_image_alone():
    boxes = random_boxes(5, 48, 70)

    def jittered(seed, img_id):
        return OracleDetector(jitter=0.1, seed=seed).detect(truth_sample(boxes, img_id), CPU).bboxes

    assert torch.equal(jittered(0, 3), jittered(0, 3))
    assert not torch.equal(jittered(0, 3), jittered(0, 4))
    assert not torch.equal(jittered(0, 3), jittered(1, 3))


def test_image_without_objects():
    found = OracleDetector(jitter=0.1).detect(truth_sample([]), CPU)
    assert found.bboxes.shape == (0, 4)


def test_pipeline_without_annotations_is_refused():
    with pytest.raises(ConfigError, match='LoadAnnotations'):
        OracleDetector().detect(make_sample(img_id=1), CPU)


@pytest.mark.parametrize('jitter', [-0.1, 0.5, 3])
def test_jitter_out_of_range(jitter):
    with pytest.raises(ConfigError, match='out of range'):
        OracleDetector(jitter=jitter)
