"""The benchmark of detectors: what is measured is a real detector with a real checkpoint; nothing asserts a time."""

import pytest
from mmengine.config import Config

from projects.instance_segment_anything import benchmark
from projects.instance_segment_anything.benchmark import DETECTORS, benchmark_detectors, detectors_table
from ptqsam.errors import ConfigError
from ptqsam.report import grid
from tests.tiny import ROOT


def test_a_small_detector(monkeypatch):
    monkeypatch.setitem(benchmark.DETECTORS, 'nano', 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py')
    result = benchmark_detectors(['nano'], 1, 1)['nano']
    assert result.keys() == {'seconds', 'peak_mb'}
    # torch and mmdet alone take more than this
    assert 200 < result['peak_mb'] < 4000
    assert detectors_table({'nano': result}).splitlines()[-1].startswith('| nano | ')


def test_unknown_detector():
    with pytest.raises(ConfigError, match="unknown detector 'yolo'; known are yolox-l, "):
        benchmark_detectors(['yolo'], 1, 1)


def test_the_detectors_are_those_of_the_pipelines_of_the_grid():
    assert {*DETECTORS, 'oracle', 'yolox-nano'} == set(grid.DETECTORS)
    for name, config in DETECTORS.items():
        paths = list((ROOT / 'configs').glob(f'*/{name}_sam*.py'))
        assert len(paths) == 9
        assert {Config.fromfile(path).model.detector for path in paths} == {config}
