"""Density and peaks: golden decisions, the sum of kernels that the histogram stands for, outliers, degenerate data."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

from ptqsam.hooks.bimodal_integration import bimodality, channel_signs
from tests.golden import Case, cases


@pytest.mark.parametrize('entry', cases('08_big_0') + cases('08_big_1'))
def test_golden(entry):
    case = Case(entry)
    k = torch.from_numpy(case.inputs['K'])
    parameters = case.parameters
    found = bimodality(k[0], parameters['global_num'], parameters['peak_height'], parameters['peak_distance'])
    case.check('density', found.density)
    case.check('grid_step', found.grid[1] - found.grid[0])
    case.check('height_threshold', found.threshold)
    case.check('is_bimodal', found.bimodal)
    if not parameters['decision_required']:
        return  # within 1 % of the least height; the density may be off by so much
    case.check('peaks', found.peaks)
    case.check('peak_positions', found.positions)
    case.check('sign', channel_signs(k.sum((0, 1), dtype=torch.float64)) if found.bimodal else [])


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(20, 3000),
    modes=st.lists(st.floats(-50, 50), min_size=1, max_size=4),
    width=st.floats(0.01, 10),
    outlier=st.sampled_from([0.0, 1e2, 1e5]),
)
def test_density_is_that_of_a_sum_of_kernels(seed, size, modes, width, outlier):
    rng = np.random.default_rng(seed)
    x = rng.choice(modes, size) + width * rng.standard_normal(size)
    x[0] += outlier
    x = torch.from_numpy(x).float()
    found = bimodality(x)
    expected = gaussian_kde(x.double().numpy())(found.grid)
    assert np.linalg.norm(found.density - expected) <= 0.01 * np.linalg.norm(expected)
    assert found.grid[0] == float(x.min()) and found.grid[-1] == float(x.max())


def two_modes(size=20000):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return x + 8 * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)


def test_positions_are_values():
    found = bimodality(two_modes())
    assert found.bimodal and np.allclose(found.positions, [-8, 8], atol=0.3)
    moved = bimodality(two_modes() * 1e-6 + 3)
    assert np.allclose(moved.positions, [3 - 8e-6, 3 + 8e-6], atol=1e-6)
    assert bimodality(two_modes().reshape(50, 400).half()).peaks == found.peaks


def test_an_outlier_hides_modes_and_a_percentile_finds_them():
    x = torch.cat([two_modes(), torch.tensor([600.0])])
    assert not bimodality(x).bimodal
    found = bimodality(x, percentile=0.999)
    assert found.bimodal and np.allclose(found.positions, [-8, 8], atol=0.3)
    assert bimodality(x, percentile=1.0).peaks == bimodality(x).peaks


@pytest.mark.parametrize('entry', cases('08_big_12'))
def test_golden_outlier_with_a_percentile(entry):
    k = torch.from_numpy(Case(entry).inputs['K'])
    assert bimodality(k[0], percentile=0.99).bimodal


@pytest.mark.parametrize('x', [torch.zeros(10), torch.full((4, 4), 1e30), torch.ones(1)])
@pytest.mark.parametrize('percentile', [None, 0.6])
def test_equal_values_have_no_peak(x, percentile):
    found = bimodality(x, percentile=percentile)
    assert found.peaks == () and not found.bimodal and found.positions == []


@pytest.mark.parametrize('x', [[0.0, 1.0], [-1e30, 0.0, 1e30], [0.0] * 99999 + [1.0]])
@pytest.mark.parametrize('percentile', [None, 0.6])
def test_few_values_and_extreme_ones(x, percentile):
    assert np.isfinite(bimodality(torch.tensor(x), percentile=percentile).density).all()


def test_sign_of_a_zero_mean_is_positive():
    assert channel_signs(torch.tensor([-1e-30, -0.0, 0.0, 2.0])).tolist() == [-1, 1, 1, 1]
