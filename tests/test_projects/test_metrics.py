"""COCO mAP over the images that were run, and mean IoU of prompted masks."""

import json

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.structures.mask import BitmapMasks

from projects.instance_segment_anything import MaskIoU, SubsetCocoMetric, encode_masks
from ptqsam.errors import AssetError

SHAPE = (40, 50)
CLASSES = ('cat', 'dog')


def box_mask(x1, y1, x2, y2):
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[y1:y2, x1:x2] = True
    return mask


OBJECTS = {  # image id -> (box, label)
    1: [((5, 5, 20, 20), 0), ((30, 10, 45, 35), 1)],
    2: [((0, 0, 10, 30), 1)],
    3: [((10, 10, 40, 30), 0)],
}


@pytest.fixture
def ann_file(tmp_path):
    annotations = [
        dict(
            id=100 * image + index,
            image_id=image,
            category_id=label + 1,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0,
            segmentation=encode_masks(box_mask(x1, y1, x2, y2)[None])[0],
        )
        for image, objects in OBJECTS.items()
        for index, ((x1, y1, x2, y2), label) in enumerate(objects)
    ]
    content = dict(
        images=[dict(id=image, file_name=f'{image}.png', height=SHAPE[0], width=SHAPE[1]) for image in OBJECTS],
        annotations=annotations,
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
    )
    path = tmp_path / 'instances.json'
    path.write_text(json.dumps(content))
    return str(path)


def truth_of(image):
    boxes = [box for box, _ in OBJECTS[image]]
    masks = np.stack([box_mask(*box).numpy() for box in boxes]).astype(np.uint8)
    return dict(bboxes=torch.tensor(boxes, dtype=torch.float32), masks=BitmapMasks(masks, *SHAPE))


def sample(image, predictions):
    """Predictions are (prompt box, mask box, label, score)."""
    prompts = torch.tensor([p[0] for p in predictions], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([p[3] for p in predictions])
    found = dict(
        bboxes=prompts,
        labels=torch.tensor([p[2] for p in predictions], dtype=torch.long),
        scores=torch.ones(len(predictions)),
        mask_scores=scores,
        masks=[encode_masks(box_mask(*p[1])[None])[0] for p in predictions],
    )
    return dict(img_id=image, ori_shape=SHAPE, gt_instances=truth_of(image), pred_instances=found)


def perfect(image):
    return sample(image, [(box, box, label, 0.9) for box, label in OBJECTS[image]])


def evaluate(metric, samples):
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process(None, samples)
    return metric.evaluate(len(samples))


@pytest.mark.parametrize('metric', ['segm', 'bbox'])
def test_perfect_predictions(metric, ann_file, capsys):
    result = evaluate(SubsetCocoMetric(ann_file, metric), [perfect(image) for image in OBJECTS])
    assert result[f'{metric}_mAP'] == pytest.approx(1)
    assert set(result) == {f'{metric}_{name}' for name in ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')}
    assert result[f'{metric}_mAP_l'] == -1  # no such object
    assert capsys.readouterr().out == ''


def test_images_that_were_not_run_do_not_count(ann_file):
    samples = [perfect(1), perfect(3)]
    assert evaluate(SubsetCocoMetric(ann_file), samples)['segm_mAP'] == pytest.approx(1)
    whole = CocoMetric(ann_file=ann_file, metric='segm')
    assert evaluate(whole, samples)['coco/segm_mAP'] < 0.9


def some_errors():
    first = sample(1, [((5, 5, 20, 20), (5, 5, 20, 17), 0, 0.9), ((30, 10, 45, 35), (30, 12, 45, 33), 1, 0.4)])
    second = sample(2, [((0, 0, 10, 30), (0, 0, 10, 30), 0, 0.8), ((0, 0, 10, 30), (0, 0, 12, 30), 1, 0.3)])
    return [first, second, sample(3, [((10, 10, 40, 30), (12, 10, 38, 30), 0, 0.7)])]


def test_equals_mmdet_on_all_images(ann_file):
    ours = evaluate(SubsetCocoMetric(ann_file), some_errors())
    theirs = evaluate(CocoMetric(ann_file=ann_file, metric='segm'), some_errors())
    assert 0.2 < ours['segm_mAP'] < 0.95
    for name, value in ours.items():
        assert theirs[f'coco/{name}'] == pytest.approx(value, abs=6e-4)  # theirs is rounded


def test_evaluating_twice_gives_the_same(ann_file):
    metric = SubsetCocoMetric(ann_file)
    first = evaluate(metric, some_errors())
    evaluate(metric, [perfect(2)])
    assert evaluate(metric, some_errors()) == first


@pytest.mark.parametrize('metric', ['segm', 'bbox'])
def test_no_predictions_at_all(metric, ann_file):
    result = evaluate(SubsetCocoMetric(ann_file, metric), [sample(1, []), sample(2, [])])
    assert result[f'{metric}_mAP'] == 0.0


def test_missing_annotation_file(tmp_path):
    with pytest.raises(AssetError, match='no such annotation file'):
        SubsetCocoMetric(str(tmp_path / 'nowhere.json'))


def test_mask_iou_of_the_best_overlapping_prompt():
    # objects of 15x15 and 15x25; their masks come out as 15x12 and 15x20; a third prompt belongs to nothing
    predictions = [
        ((29, 10, 45, 35), (30, 10, 45, 30), 0, 0.1),
        ((0, 0, 4, 4), (0, 0, 50, 40), 0, 0.9),
        ((5, 5, 20, 20), (5, 5, 20, 17), 1, 0.9),
    ]
    result = evaluate(MaskIoU(), [sample(1, predictions)])
    assert result == dict(mask_mIoU=pytest.approx((12 / 15 + 20 / 25) / 2), mask_matched=1.0)


def test_objects_without_a_prompt_are_left_out_and_counted():
    result = evaluate(MaskIoU(), [sample(1, [((5, 5, 20, 20), (5, 5, 20, 20), 0, 1.0)]), sample(2, [])])
    assert result == dict(mask_mIoU=1.0, mask_matched=pytest.approx(1 / 3))


def test_mask_iou_of_nothing():
    assert evaluate(MaskIoU(), [sample(2, [])]) == dict(mask_mIoU=0.0, mask_matched=0.0)
