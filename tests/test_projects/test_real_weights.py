"""Real weights on real images: the numbers are those of the models, not of chance."""

import pytest
import torch
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from projects.instance_segment_anything import cached_boxes
from projects.instance_segment_anything.box_cache import CachedBoxes
from tests.tiny import ROOT


@pytest.fixture
def load(assets, monkeypatch):
    monkeypatch.setenv('PTQSAM_DATA', str(assets / 'data'))
    monkeypatch.setenv('PTQSAM_CKPT', str(assets / 'ckpt'))
    monkeypatch.chdir(ROOT)
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield Config.fromfile


def test_mobile_sam_with_true_boxes(load):
    config = load('configs/oracle/oracle_mobile-sam.py')
    config.model.test_cfg.max_boxes = 4
    config.test_dataloader.dataset.indices = 2
    model = MODELS.build(config.model).eval()
    model.init_weights()
    loader = Runner.build_dataloader(config.test_dataloader)
    metric = METRICS.build(config.test_evaluator[1])
    for batch in loader:
        metric.process(None, [sample.to_dict() for sample in model.test_step(batch)])
    result = metric.evaluate(len(loader.dataset))
    assert 0.7 < result['mask_mIoU'] < 0.95
    assert result['mask_matched'] > 0


def test_boxes_of_yolox_nano(load, tmp_path):
    config = load('configs/yolox/yolox-nano_mobile-sam.py')
    config.test_dataloader.dataset.indices = 10
    with torch.device('meta'):
        detector = MODELS.build(config.model).detector
    dataset = DATASETS.build(config.test_dataloader.dataset)
    boxes = CachedBoxes(cached_boxes(detector, dataset, tmp_path, torch.device('cpu')))
    metric = METRICS.build({**config.test_evaluator[0], 'metric': 'bbox'})
    metric.dataset_meta = dataset.metainfo
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        sample = DetDataSample(metainfo=dict(img_id=info['img_id'], ori_shape=(info['height'], info['width'])))
        sample.pred_instances = boxes.detect(sample, torch.device('cpu'))
        metric.process(None, [sample.to_dict()])
    assert 0.2 < metric.evaluate(len(dataset))['bbox_mAP'] < 0.6
