"""Boxes to masks: equal to segment_anything's own predictor, in chunks, for any number of boxes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from projects.instance_segment_anything import DetectorPromptedSAM, decode_masks
from projects.instance_segment_anything.transforms import LoadImage, ResizeLongestSide
from ptqsam.errors import ConfigError
from tests.test_projects.helpers import ARCH, PREPROCESSOR, instances, make_model, make_sample, random_boxes


def predictor_of(sam):
    """segment_anything's predictor over the same modules."""
    sam.image_encoder.img_size = sam.image_size  # TinyViT does not know its input size, the predictor asks for it
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
        model.options = replace(model.options, multimask=multimask)
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


def test_preprocessing_equals_segment_anything():
    model = make_model()
    image = random_image(40, 90)
    inputs, _ = preprocess(model, image)
    predictor = predictor_of(model.sam)
    resized = torch.from_numpy(predictor.transform.apply_image(np.ascontiguousarray(image[..., ::-1])))
    assert torch.equal(inputs, predictor.model.preprocess(resized.permute(2, 0, 1)[None]))


def run(model, proposals, shape=(48, 70)):
    inputs, samples = preprocess(model, random_image(*shape), proposals)
    return model.predict(inputs, samples)[0].pred_instances


def test_chunks_do_not_change_the_masks():
    boxes = instances(random_boxes(7, 48, 70))
    whole, parts = (run(make_model(chunk_size=size), boxes) for size in (16, 3))
    assert whole.masks == parts.masks
    assert torch.allclose(whole.mask_scores, parts.mask_scores, atol=1e-6)


def test_large_images_are_scaled_in_parts(monkeypatch):
    boxes = instances(random_boxes(5, 48, 70))
    whole = run(make_model(), boxes)
    monkeypatch.setattr('projects.instance_segment_anything.detector_prompted_sam._MAX_PIXELS', 2 * 64 * 64)
    assert run(make_model(), boxes).masks == whole.masks


def test_no_boxes_give_empty_predictions():
    found = run(make_model(), instances([]))
    assert len(found) == 0
    assert found.bboxes.shape == (0, 4)
    assert found.scores.shape == found.labels.shape == found.mask_scores.shape == (0,)
    assert found.masks == []
    assert decode_masks(found.masks, (48, 70)).shape == (0, 48, 70)


def test_selection_by_score_and_number():
    boxes = instances(random_boxes(5, 48, 70), scores=[0.3, 0.9, 0.04, 0.9, 0.05], labels=[0, 1, 2, 3, 4])
    assert run(make_model(), boxes).labels.tolist() == [1, 3, 0, 4]
    assert run(make_model(max_boxes=2), boxes).labels.tolist() == [1, 3]
    assert run(make_model(score_thr=0.0), boxes).labels.tolist() == [1, 3, 0, 4, 2]
    assert len(run(make_model(score_thr=0.95), boxes)) == 0


def test_boxes_of_the_original_image_are_returned():
    boxes = random_boxes(4, 48, 70)
    assert torch.equal(run(make_model(), instances(boxes)).bboxes, boxes)


def test_score_of_an_instance():
    boxes = instances(random_boxes(3, 48, 70), scores=[0.8, 0.7, 0.6])
    plain = run(make_model(use_sam_iou=False), boxes)
    times_iou = run(make_model(), boxes)
    assert torch.equal(plain.mask_scores, boxes.scores)
    assert torch.equal(times_iou.scores, boxes.scores)
    inputs, samples = preprocess(make_model(), random_image(48, 70))
    model = make_model()
    with torch.no_grad():
        _, iou = model.decode_logits(
            model.encode(inputs), boxes.bboxes * torch.tensor(samples[0].scale_factor).repeat(2)
        )
    assert torch.allclose(times_iou.mask_scores, boxes.scores * iou)


def test_cascade_feeds_the_mask_back():
    model = make_model()
    inputs, _ = preprocess(model, random_image(48, 70))
    boxes = random_boxes(3, 64, 64)
    with torch.no_grad():
        embedding = model.encode(inputs)
        logits, _ = model.sam.decode(embedding, boxes)
        expected, expected_iou = model.sam.decode(embedding, boxes, logits)
        model.options = replace(model.options, cascade=1)
        found, iou = model.decode_logits(embedding, boxes)
    assert torch.equal(found, expected[:, 0])
    assert torch.equal(iou, expected_iou[:, 0])
    assert not torch.equal(found, logits[:, 0])


def test_batch_of_images_equals_one_by_one():
    model = make_model()
    images = [random_image(48, 70), random_image(64, 40)]
    proposals = [instances(random_boxes(3, *image.shape[:2])) for image in images]
    singles = [preprocess(model, image, boxes) for image, boxes in zip(images, proposals, strict=True)]
    alone = [model.predict(inputs, samples)[0].pred_instances for inputs, samples in singles]
    both = model.predict(torch.cat([inputs for inputs, _ in singles]), [samples[0] for _, samples in singles])
    for one, sample in zip(alone, both, strict=True):
        assert (
            np.mean(
                decode_masks(one.masks, sample.ori_shape) != decode_masks(sample.pred_instances.masks, sample.ori_shape)
            )
            < 1e-3
        )
        assert torch.allclose(one.mask_scores, sample.pred_instances.mask_scores, atol=1e-5)


def test_detector_is_neither_built_nor_part_of_the_model(tmp_path):
    model = make_model(detector='mmdet::yolox/yolox_nano_8xb8-300e_coco.py')
    run(model, instances(random_boxes(2, 48, 70)))  # needs no detector, hence no checkpoint of one
    assert {key.split('.')[0] for key in model.state_dict()} == {'sam'}
    inputs, samples = preprocess(model, random_image(48, 70))
    with pytest.raises(ConfigError, match='detector_checkpoint is missing'):
        model.predict(inputs, samples)


@pytest.mark.parametrize(
    ('test_cfg', 'says'),
    [
        (dict(score_threshold=0.1), "did you mean 'score_thr'"),
        (dict(chunk_size=0), 'chunk_size=0 is too small'),
        (dict(max_boxes='many'), "max_boxes='many' must be a whole number"),
        (dict(max_boxes=True), 'max_boxes=True must be a whole number'),
        (dict(score_thr='high'), "score_thr='high' must be a number"),
        (dict(score_thr=float('nan')), 'score_thr=nan must be a number'),
        (dict(cascade=1.5), 'cascade=1.5 must be a whole number'),
        (dict(use_sam_iou='no'), "use_sam_iou='no' must be True or False"),
    ],
)
def test_bad_test_cfg(test_cfg, says):
    with pytest.raises(ConfigError, match=says):
        make_model(**test_cfg)


def test_a_whole_number_is_a_number():
    assert make_model(score_thr=0).options.score_thr == 0


SAM = dict(type='SegmentAnything', arch=ARCH, image_size=64)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (
            dict(detectr_checkpoint='x'),
            r"^model: unknown key 'detectr_checkpoint' \(did you mean 'detector_checkpoint'",
        ),
        (dict(detector=5), r'^model\.detector=5 must be'),
        (dict(detector=dict(type='OracleDetector', jiter=0.1)), r"^model\.detector: .*did you mean 'jitter'"),
        (dict(detector=dict(type='OracleDetector', jitter='0.1')), r"^model\.detector\.jitter='0\.1' must be a number"),
        (dict(detector='mmdet::a.py', detector_checkpoint=5), r'^model\.detector_checkpoint=5 must be a path'),
        (dict(sam='vit_b'), r"^model\.sam='vit_b' must be a dict"),
        (dict(sam=dict(SAM, image_sise=64)), r"^model\.sam: .*did you mean 'image_size'"),
        (dict(sam=dict(SAM, image_size='64')), r"^model\.sam\.image_size='64' must be a whole number"),
        (dict(sam=dict(SAM, type='SegmntAnything')), r'^model\.sam: cannot be built .*SegmntAnything'),
        (dict(sam=dict(SAM, checkpoint=5)), r'^model\.sam\.checkpoint=5 must be a path'),
        (dict(sam=dict(SAM, arch=5)), r'^model\.sam\.arch=5 must be one of'),
        (dict(sam=dict(SAM, arch=dict(depth='two'))), r"^model\.sam\.arch\.depth='two' must be a whole number"),
        (
            dict(sam=dict(SAM, arch=dict(global_attn_indexes=2))),
            r'global_attn_indexes=2 must be a list of whole numbers',
        ),
        (dict(test_cfg=5), r'^model\.test_cfg=5 must be a dict'),
        (dict(data_preprocessor=dict(PREPROCESSOR, meen=[0])), r'^model\.data_preprocessor: cannot be built .*meen'),
    ],
)
def test_bad_model_config(change, says):
    config = dict(type='DetectorPromptedSAM', detector=dict(type='OracleDetector'), sam=SAM)
    with pytest.raises(ConfigError, match=says) as error:
        MODELS.build({**config, **change})
    assert '\n' not in str(error.value)


def test_missing_argument():
    with pytest.raises(ConfigError, match="model: missing a required argument: 'detector'"):
        MODELS.build(dict(type='DetectorPromptedSAM', sam=SAM))


@pytest.mark.parametrize('mode', ['loss', 'tensor'])
def test_training_is_refused(mode):
    with pytest.raises(NotImplementedError, match='DetectorPromptedSAM has no'):
        make_model()(torch.zeros(1, 3, 64, 64), [], mode=mode)
