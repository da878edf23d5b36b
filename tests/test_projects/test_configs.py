"""Every shipped model config: complete, buildable on the meta device, alike in both formats."""

import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from projects.instance_segment_anything import DetectorPromptedSAM, OracleDetector, describe_sam
from projects.scenes import CATEGORIES
from ptqsam.download import CHECKPOINTS
from tests.tiny import ROOT

CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'configs').glob('*/*.*')
    if path.parent.name != '_base_' and path.suffix in ('.py', '.yaml')
)
SAMS = {'mobile-sam': 'mobile', 'sam-vit-b': 'vit_b', 'sam-vit-l': 'vit_l', 'sam-vit-h': 'vit_h'}
DETECTORS = {'yolox-nano': 'YOLOX', 'yolox-l': 'YOLOX', 'faster-rcnn_r50': 'FasterRCNN'}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setenv('PTQSAM_DATA', 'the_data')
    monkeypatch.setenv('PTQSAM_CKPT', 'the_ckpt')
    return lambda name: Config.fromfile(ROOT / name)


def test_expected_configs_are_there():
    expected = {f'configs/oracle/oracle_{sam}.py' for sam in SAMS}
    for size in ('b', 'l', 'h'):
        expected.add(f'configs/yolox/yolox-l_sam-vit-{size}.py')
        expected.add(f'configs/faster_rcnn/faster-rcnn_r50_sam-vit-{size}.py')
    expected |= {'configs/demo/demo.py', 'configs/yolox/yolox-nano_mobile-sam.py'}
    assert expected <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_model_builds_on_meta(name, load):
    config = load(name)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert isinstance(model, DetectorPromptedSAM)
    detector, _, sam = name.split('/')[-1].split('.')[0].rpartition('_')
    if detector in ('oracle', *DETECTORS):
        assert describe_sam(model.sam.state_dict()) == f"SAM '{SAMS[sam]}'"
    if detector in DETECTORS:
        assert model.detector.resolve()[0]['type'] == DETECTORS[detector]
    else:
        assert isinstance(model.detector, OracleDetector)


@pytest.mark.parametrize('name', CONFIGS)
def test_paths_follow_the_environment(name, load):
    config = load(name)
    files = {checkpoint.file_name for checkpoint in CHECKPOINTS.values()} | {'yolox_nano_mmdet.pth'}
    weights = [config.model.sam.checkpoint, config.model.get('detector_checkpoint')]
    for path in filter(None, weights):
        folder, _, file = path.rpartition('/')
        assert folder == 'the_ckpt'
        assert file in files
    for dataset in (config.calib_dataset, config.test_dataloader.dataset):
        assert re.fullmatch(r'the_data/(coco|scenes)/', dataset.data_root)
    assert config.test_evaluator[0].ann_file.startswith('the_data/')


@pytest.mark.parametrize('name', CONFIGS)
def test_calibration_and_evaluation_are_different_splits_in_one_pipeline(name, load):
    config = load(name)
    calibration, evaluation = config.calib_dataset, config.test_dataloader.dataset
    assert 'train' in calibration.ann_file
    assert 'train' in calibration.data_prefix.img
    assert 'val' in evaluation.ann_file
    assert 'val' in evaluation.data_prefix.img
    assert config.test_evaluator[0].ann_file == evaluation.data_root + evaluation.ann_file
    assert calibration.pipeline == evaluation.pipeline
    assert calibration.test_mode
    assert [metric.type for metric in config.test_evaluator] == ['SubsetCocoMetric', 'MaskIoU']


def test_yaml_and_python_load_alike(load):
    python, yaml = load('configs/demo/demo.py'), load('configs/demo/demo_jitter.yaml')
    assert yaml.model.detector == dict(type='OracleDetector', jitter=0.1)
    python.model.detector.jitter = 0.1
    assert yaml.to_dict() == python.to_dict()


def test_environment_works_in_yaml(load, tmp_path):
    path = tmp_path / 'own.yaml'
    path.write_text(
        f'_base_: {ROOT}/configs/oracle/oracle_mobile-sam.py\n'
        "model: {sam: {checkpoint: '{{$PTQSAM_CKPT:ckpt}}/own.pth'}}\n"
        "test_dataloader: {dataset: {data_root: '{{$PTQSAM_OTHER:elsewhere}}/coco/'}}\n"
    )
    config = load(path)
    assert config.model.sam.checkpoint == 'the_ckpt/own.pth'
    assert config.test_dataloader.dataset.data_root == 'elsewhere/coco/'


def test_classes_of_the_scenes(load):
    assert tuple(load('configs/demo/demo.py').calib_dataset.metainfo.classes) == CATEGORIES
