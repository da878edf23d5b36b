"""The benchmark of sensitivities runs all quantizers of a tiny SAM in both modes."""

from functools import partial

from projects.instance_segment_anything import SegmentAnything
from ptqsam.benchmark import Setting
from ptqsam.benchmark_sensitivity import benchmark_sensitivity, sensitivity_table
from tests.test_reconstruction.helpers import make_recipe
from tests.tiny import ARCH


def test_both_modes_and_the_table():
    result = benchmark_sensitivity(Setting(partial(SegmentAnything, ARCH, 64), make_recipe()))
    assert set(result) == {'enabled', 'disabled'}
    for found in result.values():
        assert found['quantizers'] == 120 and found['whole'] > 0 and found['prefix'] > 0
        assert found['ratio'] == found['prefix'] / found['whole']
    assert sensitivity_table(result).count('120') == 2
