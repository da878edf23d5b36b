"""Any mmdet detector, by name, path or dict; nothing is built before the first box is asked for."""

import os
import sys

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from PIL import Image

from projects.instance_segment_anything import mmdet_detector
from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from ptqsam.errors import AssetError, ConfigError
from tests.test_projects.helpers import make_sample

NANO = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A YOLOX-nano with random weights, whose scores are high enough to give boxes."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(ConfigDict(MMDetDetector(NANO).resolve()[0]))
    state = model.state_dict()
    path = tmp_path_factory.mktemp('nano') / 'nano.pth'
    # averaged weights that training leaves beside the weights
    torch.save({'state_dict': {**state, 'ema_backbone_stem_conv_conv_weight': torch.zeros(1)}}, path)
    return str(path)


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'a.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ('name', 'kind'), [(NANO, 'YOLOX'), ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py', 'FasterRCNN')]
)
def test_config_by_name(name, kind):
    model, pipeline = MMDetDetector(name).resolve()
    assert model['type'] == kind
    steps = [step['type'] for step in pipeline]
    assert steps[0] == 'LoadImage'
    assert steps[-1] == 'PackDetInputs'
    assert 'LoadAnnotations' not in steps


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a detector class and configs, of which one is also where OpenMMLab has its configs."""
    source = 'from mmdet.registry import MODELS\nfrom mmdet.models import YOLOX\n'
    source += '@MODELS.register_module()\nclass OwnYOLOX(YOLOX):\n    pass\n'
    folder = tmp_path / 'own_detectors'
    for place in ('configs', 'configs/more', '.mim/configs'):
        (folder / place).mkdir(parents=True)
    (folder / '__init__.py').write_text(source)
    end = "test_dataloader = dict(dataset=dict(pipeline=[dict(type='PackDetInputs')]))\n"
    (folder / 'configs/own.py').write_text(f"model = dict(type='OwnYOLOX')\n{end}")
    (folder / 'configs/more/based.py').write_text("_base_ = '../own.py'\n")
    (folder / 'configs/both.py').write_text(f"model = dict(type='Wrong')\n{end}")
    (folder / '.mim/configs/both.py').write_text(f"model = dict(type='OwnYOLOX')\n{end}")
    monkeypatch.syspath_prepend(tmp_path)
    yield 'own_detectors'
    MODELS.module_dict.pop('OwnYOLOX', None)
    sys.modules.pop('own_detectors', None)


@pytest.mark.parametrize('path', ['own.py', 'more/based.py', 'both.py'])
def test_config_in_a_package_registers_its_classes(package, path):
    assert 'OwnYOLOX' not in MODELS.module_dict
    assert MMDetDetector(f'{package}::{path}').resolve()[0]['type'] == 'OwnYOLOX'
    assert MODELS.module_dict['OwnYOLOX'].__module__ == package


def test_missing_config_in_a_package(package):
    with pytest.raises(
        ConfigError, match=r"model\.detector='own_detectors::nowhere\.py': cannot read .*configs/nowhere"
    ):
        MMDetDetector(f'{package}::nowhere.py').resolve()


def _with_heads(**model):
    return MMDetDetector(dict(type='YOLOX', **model), pipeline=[dict(type='LoadImage')])


@pytest.mark.parametrize(
    ('detector', 'classes'),
    [
        (MMDetDetector(NANO), 80),
        (MMDetDetector('mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py'), 80),
        (MMDetDetector('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'), 80),
        (MMDetDetector('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'), 80),
        (_with_heads(bbox_head=dict(num_classes=7)), 7),
        (_with_heads(roi_head=dict(bbox_head=[dict(num_classes=3), dict(num_classes=4)])), 4),
        (_with_heads(roi_head=dict(bbox_head=[])), None),
        (_with_heads(bbox_head=dict(type='YOLOXHead')), None),
        (_with_heads(), None),
    ],
)
def test_number_of_classes(detector, classes):
    assert detector.num_classes() == classes


def test_weights_are_hashed_once_and_again_when_they_change(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(mmdet_detector, 'sha256_file', lambda path: hashed.append(path) or f'{len(hashed)}')
    path = tmp_path / 'a.pth'
    path.write_bytes(b'one')
    detector = MMDetDetector(NANO, str(path))
    assert [detector.identity()['weights'] for _ in range(3)] == ['1', '1', '1']
    path.write_bytes(b'other')
    assert [detector.identity()['weights'] for _ in range(2)] == ['2', '2']
    os.utime(path, ns=(0, 0))  # of the same size, but written at another time
    assert detector.identity()['weights'] == '3'


def test_moves_to_the_device_once(weights, image, monkeypatch):
    moves = []
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, device: moves.append(device) or move(self, device))
    detector = MMDetDetector(NANO, weights)
    for _ in range(2):
        detector.detect(make_sample(img_id=1, img_path=image), CPU)
    assert moves == [CPU]
    detector.release()
    detector.detect(make_sample(img_id=1, img_path=image), CPU)
    assert moves == [CPU, CPU]


def test_detect(weights, image):
    detector = MMDetDetector(NANO, weights)
    found = detector.detect(make_sample(img_id=1, img_path=image), CPU)
    assert len(found) > 0
    assert set(found.keys()) == {'bboxes', 'scores', 'labels'}
    assert found.bboxes.shape == (len(found), 4)
    # boxes are in pixels of the image, not of the 416 pixels that the detector sees
    assert found.bboxes[:, 2].median() < 120
    assert found.bboxes[:, 3].median() < 80
    detector.release()
    again = detector.detect(make_sample(img_id=1, img_path=image), CPU)
    assert torch.equal(found.bboxes, again.bboxes)


def test_config_as_dict_or_file_is_the_same_detector(weights, image, tmp_path):
    model, pipeline = MMDetDetector(NANO).resolve()
    config = tmp_path / 'own.py'
    config.write_text(f'model = {model!r}\ntest_dataloader = dict(dataset=dict(pipeline={pipeline!r}))\n')
    detectors = [
        MMDetDetector(NANO, weights),
        MMDetDetector(ConfigDict(model), weights, pipeline),
        MMDetDetector(str(config), weights),
    ]
    assert detectors[0].identity() == detectors[1].identity() == detectors[2].identity()
    boxes = [detector.detect(make_sample(img_id=1, img_path=image), CPU).bboxes for detector in detectors]
    assert torch.equal(boxes[0], boxes[1])
    assert torch.equal(boxes[0], boxes[2])


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (dict(config='mmdet::yolox/nowhere.py'), 'cannot read this config'),
        (dict(config='no_such_package::a.py'), 'cannot read this config'),
        (dict(config='nowhere.py'), 'cannot read this config'),
        (dict(config='mmdet.version::a.py'), 'cannot read this config'),
        (dict(config='.mmdet::a.py'), 'cannot read this config'),
        (dict(config=dict(type='YOLOX')), 'detector_pipeline'),
        (dict(config=NANO), 'detector_checkpoint is missing'),
        (dict(config=dict(type='YOLOY'), pipeline=[dict(type='LoadImage')]), 'cannot be built .*YOLOY'),
        (
            dict(config=dict(type='YOLOX', nek=1), pipeline=[dict(type='LoadImage')]),
            r'model\.detector: cannot be built',
        ),
    ],
)
def test_bad_config(arguments, says, image):
    with pytest.raises(ConfigError, match=says) as error:
        MMDetDetector(**arguments).detect(make_sample(img_id=1, img_path=image), CPU)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('step', [dict(type='Resiz', scale=64), dict(scale=64), dict(type='Resize', scael=64)])
def test_bad_pipeline(step, weights, image):
    model, pipeline = MMDetDetector(NANO).resolve()
    with pytest.raises(ConfigError, match=r'^model\.detector_pipeline: cannot be built'):
        MMDetDetector(model, weights, [*pipeline, step]).detect(make_sample(img_id=1, img_path=image), CPU)


def test_missing_checkpoint(image, tmp_path):
    path = str(tmp_path / 'nowhere.pth')
    for use in (MMDetDetector.identity, lambda detector: detector.detect(make_sample(img_id=1, img_path=image), CPU)):
        with pytest.raises(AssetError, match=r'nowhere\.pth: no such file'):
            use(MMDetDetector(NANO, path))


def test_checkpoint_of_another_detector(weights, image):
    other = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
    with pytest.raises(AssetError, match=r'holds YOLOX-nano, which does not fit model\.detector \(YOLOX-tiny\)'):
        MMDetDetector(other, weights).detect(make_sample(img_id=1, img_path=image), CPU)


def test_missing_image(weights):
    with pytest.raises(AssetError, match='image is missing'):
        MMDetDetector(NANO, weights).detect(make_sample(img_id=1, img_path='nowhere.png'), CPU)
