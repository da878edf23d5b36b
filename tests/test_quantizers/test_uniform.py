"""The uniform quantizer beyond the common contract."""

import pytest
import torch
from torch import nn

from ptqsam.quantizers import Uniform


def test_levels_are_equally_spaced_and_contain_zero():
    quantizer = Uniform(4)
    quantizer.mode = 'observe'
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.mode = 'quantize'
    levels = quantizer.levels()
    assert levels.shape == (16,) and 0 in levels
    torch.testing.assert_close(levels.diff(), torch.full((15,), 0.2))


def test_levels_per_channel():
    quantizer = Uniform(3, ch_axis=1, symmetric=True)
    quantizer.mode = 'observe'
    quantizer(torch.tensor([[-1.0, 10.0], [0.5, -20.0]]))
    quantizer.mode = 'quantize'
    levels = quantizer.levels()
    assert levels.shape == (2, 8)
    torch.testing.assert_close(levels[:, 0], torch.tensor([-4 / 3.5, -80 / 3.5]))
    assert (levels[:, 4] == 0).all()


@pytest.mark.parametrize('observer', ['MinMax', 'AvgMinMax', 'MSE', 'AvgMSE', 'MSEFast', 'AvgMSEFast', 'Percentile'])
@pytest.mark.parametrize('ch_axis', [None, 0])
def test_every_observer(observer, ch_axis):
    torch.manual_seed(0)
    x = torch.randn(6, 500)
    quantizer = Uniform(6, ch_axis=ch_axis, observer=dict(type=observer))
    quantizer.mode = 'observe'
    quantizer(x)
    quantizer.mode = 'quantize'
    assert (quantizer(x) - x).square().mean() < 0.01 * x.square().mean()


def test_observer_options_reach_the_observer():
    quantizer = Uniform(6, observer=dict(type='Percentile', percentile=0.9))
    assert quantizer.observer.candidates == (0.9,) and quantizer.observer.bits == 6
    assert 'bits=6, asymmetric, per tensor, observer=Percentile, mode=off' in repr(quantizer)


def test_state_holds_parameters_only():
    quantizer = Uniform(4, ch_axis=0)
    assert set(quantizer.state_dict()) == {'scale', 'zero_point'}
    assert not list(quantizer.parameters())


def test_inside_a_model_that_is_loaded_and_copied():
    def model():
        return nn.ModuleDict({'a': Uniform(4), 'b': Uniform(4, ch_axis=0)})

    source, target = model(), model()
    for quantizer in source.values():
        quantizer.mode = 'observe'
        quantizer(torch.randn(7, 9))
        quantizer.mode = 'quantize'
    target.load_state_dict(source.state_dict())
    assert target['b'].scale.shape == (7,) and target['a'].scale.shape == ()
    # a second load into other shapes
    target['b'].reset()
    target.load_state_dict(source.state_dict(), assign=True)
    target['b'].mode = 'quantize'
    x = torch.randn(7, 9)
    assert torch.equal(target['b'](x), source['b'](x))


def test_gradient_reaches_the_input():
    quantizer = Uniform(8)
    quantizer.mode = 'observe'
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.mode = 'quantize'
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    quantizer(x, inplace=True).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
