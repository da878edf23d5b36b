"""The benchmark of detectors: what is measured is a real detector with a real checkpoint; nothing asserts a time."""

import pytest

from projects.instance_segment_anything import benchmark
from projects.instance_segment_anything.benchmark import DETECTORS, benchmark_detectors, detectors_table
from projects.instance_segment_anything.mmdet_detector import MMDetDetector
from ptqsam.errors import ConfigError


def test_a_small_detector(monkeypatch):
    monkeypatch.setitem(benchmark.DETECTORS, 'nano', 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py')
    result = benchmark_detectors(['nano'], 1, 1)['nano']
    assert 0 < result['seconds'] < 100
    # torch and mmdet alone take more than this
    assert 200 < result['peak_mb'] < 4000
    assert detectors_table({'nano': result}).splitlines()[-1].startswith('| nano | ')


def test_unknown_detector():
    with pytest.raises(ConfigError, match="unknown detector 'yolo'; known are yolox-l, "):
        benchmark_detectors(['yolo'], 1, 1)


def test_the_four_detectors_are_those_of_the_pipelines():
    kinds = {name: MMDetDetector(config).resolve()[0]['type'] for name, config in DETECTORS.items()}
    expected = dict(zip(DETECTORS, ('YOLOX', 'FasterRCNN', 'HDeformableDETR', 'FocalNetDINO'), strict=True))
    assert kinds == expected
