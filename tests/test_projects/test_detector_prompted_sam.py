"""Boxes to masks: equal to segment_anything's own predictor, in chunks, for any number of boxes."""

import copy

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from projects.instance_segment_anything import DetectorPromptedSAM, SegmentAnything, decode_masks
from projects.instance_segment_anything.transforms import LoadImage, ResizeLongestSide
from ptqsam.errors import ConfigError
from tests.test_projects.helpers import PREPROCESSOR, instances, make_model, make_sample, random_boxes


def predictor_of(sam):
    """segment_anything's predictor over the same modules."""
    return SamPredictor(Sam(sam.image_encoder, sam.prompt_encoder, sam.mask_decoder).eval())


def preprocess(model, image, proposals=None):
    """The way of an image (H, W, 3 BGR) through pipeline and data preprocessor."""
    results = ResizeLongestSide(model.sam.image_size).transform({'img': image})
    meta = {key: results[key] for key in ('img_shape', 'scale_factor')}
    sample = make_sample(proposals, img_id=7, img_path='7.png', ori_shape=image.shape[:2], **meta)
    inputs = torch.from_numpy(results['img']).permute(2, 0, 1)
    data = model.data_preprocessor({'inputs': [inputs], 'data_samples': [sample]}, False)
    return data['inputs'], data['data_samples']


def random_image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def check_against_predictor(model, image, boxes):
    """Logits, predicted IoU and masks for all boxes equal those of SamPredictor."""
    predictor = predictor_of(model.sam)
    predictor.set_image(np.ascontiguousarray(image[..., ::-1]))  # wants RGB
    resized = predictor.transform.apply_boxes_torch(boxes, image.shape[:2])
    inputs, samples = preprocess(model, image, instances(boxes))
    with torch.no_grad():
        embeddings = model.encode(inputs)
    assert torch.equal(embeddings, predictor.features)
    for multimask in (False, True):
        model.options = copy.replace(model.options, multimask=multimask) if hasattr(copy, 'replace') else replace(
            model.options, multimask=multimask
        )
        logits, iou, _ = predictor.predict_torch(
            None, None, boxes=resized, multimask_output=multimask, return_logits=True
        )
        best = iou.argmax(dim=1)
        rows = torch.arange(len(boxes))
        found = model.predict_from(embeddings, samples)[0].pred_instances
        expected = (logits[rows, best] > 0).numpy()
        assert np.array_equal(decode_masks(found.masks, image.shape[:2]), expected)
        assert torch.equal(found.mask_scores, iou[rows, best])
        assert 0 < expected.mean() < 1, 'the comparison says nothing about empty or full masks'


def replace(options, **changes):
    import dataclasses

    return dataclasses.replace(options, **changes)


@pytest.mark.parametrize('shape', [(48, 70), (90, 31), (64, 64)])
def test_equals_segment_anything(shape):
    model = make_model()
    check_against_predictor(model, random_image(*shape), random_boxes(5, *shape))


def test_equals_segment_anything_with_real_weights(assets):
    sam = dict(type='SegmentAnything', arch='mobile', checkpoint=str(assets / 'ckpt' / 'mobile_sam.pt'))
    preprocessor = dict(PREPROCESSOR, pad_size_divisor=1024)
    model = DetectorPromptedSAM(dict(type='OracleDetector'), sam, data_preprocessor=preprocessor).eval()
    model.init_weights()
    path = sorted((assets / 'data' / 'coco' / 'val2017').glob('*.jpg'))[0]
    image = LoadImage().transform({'img_path': str(path)})['img']
    check_against_predictor(model, image, random_boxes(3, *image.shape[:2]))
