"""The MSE family: golden vectors, what is pooled and what is averaged."""

import numpy as np
import pytest
import torch

from ptqsam.functional import choose_qparams, lp_error, quant_range
from ptqsam.registry import OBSERVERS
from tests import golden

FAMILY = ('MSE', 'AvgMSE', 'MSEFast', 'AvgMSEFast')


def build(name: str, **settings):
    """Make an observer by its registered name."""
    return OBSERVERS.build(dict(type=name, **settings))


def achieved(x: torch.Tensor, observer) -> torch.Tensor:
    """Error of an observer's range, measured as the golden vectors demand: float32 division, float64 mean."""
    scale, zero_point = observer.qparams()
    if observer.ch_axis is not None:
        shape = [1] * x.dim()
        shape[observer.ch_axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    codes = ((x / scale).round() + zero_point).clamp(*quant_range(observer.bits, observer.symmetric))
    return lp_error(x, (codes - zero_point) * scale, ch_axis=observer.ch_axis)


def observe(name: str, data: list, case: golden.Case):
    """Observer of a golden case after seeing some tensors."""
    settings = {key: case.parameters[key] for key in ('bits', 'symmetric')}
    observer = build(name, ch_axis=case.ch_axis, **settings)
    for x in data:
        observer.update(x)
    return observer


SINGLE = golden.cases('02_mse_tensor') + golden.cases('02_mse_channel') + golden.cases('02_msefast')
BATCHES = golden.cases('02_mse_batches') + golden.cases('02_avgmse')


@pytest.mark.parametrize('entry', SINGLE)
def test_golden_error_of_one_call(entry):
    case = golden.Case(entry)
    x = torch.from_numpy(case.inputs['x'])
    case.check('error', achieved(x, observe(case.parameters['observer'], [x], case)))


@pytest.mark.parametrize('entry', [entry for entry in SINGLE if 'msefast' in str(entry.id)])
def test_mse_meets_the_golden_errors_of_msefast_too(entry):
    case = golden.Case(entry)
    x = torch.from_numpy(case.inputs['x'])
    case.check('error', achieved(x, observe('MSE', [x], case)))


@pytest.mark.parametrize('entry', BATCHES)
def test_golden_error_of_several_calls(entry):
    case = golden.Case(entry)
    name = case.parameters['observer']
    data = list(torch.from_numpy(case.inputs['x']))
    alone = [observe(name, [x], case) for x in data]
    case.check('batch_error', np.stack([achieved(x, observer) for x, observer in zip(data, alone, strict=True)]))
    together = observe(name, data, case)
    case.check('error', np.mean([achieved(x, together) for x in data]))
    if name.startswith('Avg'):
        mean = torch.stack([torch.stack(observer.bounds()) for observer in alone]).mean(0)
        torch.testing.assert_close(torch.stack(together.bounds()), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('bits', [2, 4, 6])
def test_pooling_minimises_the_total_error(bits):
    # a few calls with a wide range among many narrow ones: extremes are too wide, the mean is a compromise
    torch.manual_seed(bits)
    data = [torch.randn(2000) * (1 + 9 * (i == 3)) for i in range(8)]
    errors = {}
    for name in ('MSE', 'AvgMSE', 'AvgMinMax', 'MinMax'):
        observer = build(name, bits=bits)
        for x in data:
            observer.update(x)
        errors[name] = sum(achieved(x, observer).item() for x in data)
    assert all(errors['MSE'] <= errors[name] * (1 + 1e-9) for name in errors)
    assert errors['MSE'] < 0.9 * errors['AvgMinMax']


@pytest.mark.parametrize('name', FAMILY)
def test_order_and_grouping_of_calls(name):
    torch.manual_seed(0)
    data = [torch.randn(4000) for _ in range(3)]
    forward, backward, joined = (build(name, bits=4) for _ in range(3))
    for x in data:
        forward.update(x)
    for x in reversed(data):
        backward.update(x)
    joined.update(torch.cat(data))
    torch.testing.assert_close(forward.bounds(), backward.bounds(), rtol=1e-5, atol=0)
    if not name.startswith('Avg'):
        torch.testing.assert_close(forward.bounds(), joined.bounds(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', FAMILY)
def test_calls_of_different_sizes(name):
    torch.manual_seed(0)
    observer = build(name, bits=4)
    for size in (100, 20000, 100, 90000, 20000):
        observer.update(torch.randn(size))
    lo, hi = observer.bounds()
    assert -4 < lo < -1.5 and 1.5 < hi < 4


@pytest.mark.parametrize('name', ['MSE', 'AvgMSE'])
def test_channels_are_independent(name):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 40) * torch.logspace(-3, 3, 6).view(1, 6, 1)
    observer = build(name, bits=4, ch_axis=1)
    observer.update(x)
    for channel, (lo, hi) in enumerate(zip(*observer.bounds(), strict=True)):
        single = build(name, bits=4)
        single.update(x[:, channel])
        torch.testing.assert_close(torch.stack([lo, hi]), torch.stack(single.bounds()), rtol=1e-5, atol=0)


def test_another_seed_draws_another_sample():
    x = torch.randn(200000)
    bounds = []
    for seed in (0, 0, 1):
        observer = build('MSE', bits=8, seed=seed)
        observer.update(x)
        bounds.append(observer.samples[0].values)
    assert torch.equal(bounds[0], bounds[1]) and not torch.equal(bounds[0], bounds[2])


def test_weights_are_kept_exactly():
    weight = torch.randn(8, 30000)
    observer = build('MSE', bits=4, ch_axis=0)
    observer.update(weight)
    values, weights = observer.pooled()
    assert torch.equal(values, weight) and weights is None


def test_choose_qparams_returns_the_searched_parameters():
    # the range that the search returns must lead to exactly the grid that it scored
    torch.manual_seed(0)
    for bits in range(2, 9):
        for symmetric in (False, True):
            observer = build('MSE', bits=bits, symmetric=symmetric, ch_axis=0)
            x = torch.randn(50, 200) + torch.randn(50, 1)
            observer.update(x)
            lo, hi = observer.bounds()
            scale, zero_point = choose_qparams(lo, hi, bits, symmetric)
            qmin, qmax = quant_range(bits, symmetric)
            if symmetric:
                torch.testing.assert_close(hi, scale * (qmax - qmin) / 2)
            else:
                # a range that clips nothing is returned as it is, not rounded to the grid
                searched = lo != x.amin(1).clamp(max=0)
                assert searched.any()
                torch.testing.assert_close(lo[searched], ((qmin - zero_point) * scale)[searched], rtol=1e-5, atol=0)
