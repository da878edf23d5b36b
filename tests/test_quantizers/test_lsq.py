"""LSQ: golden vectors through the module, the learned scale."""

import pytest
import torch
from torch.nn.functional import mse_loss

from ptqsam.quantizers import LSQ
from tests import golden


def make(x: torch.Tensor, bits: int = 4, **settings) -> LSQ:
    """A quantizer that observed a tensor."""
    quantizer = LSQ(bits, **settings)
    quantizer.mode = 'observe'
    quantizer(x)
    quantizer.mode = 'quantize'
    return quantizer


@pytest.mark.parametrize('entry', golden.cases('03_lsq'))
def test_golden(entry):
    case = golden.Case(entry)
    quantizer = LSQ(case.parameters['bits'], ch_axis=case.ch_axis, symmetric=case.parameters['symmetric'])
    shape = () if case.ch_axis is None else (-1,)
    state = {name: torch.from_numpy(case.inputs[name]) for name in ('scale_in', 'zero_point')}
    quantizer.load_state_dict(
        {'scale': state['scale_in'].reshape(shape), 'zero_point': state['zero_point'].reshape(shape)}
    )
    quantizer.mode = 'quantize'
    x = torch.from_numpy(case.inputs['x']).requires_grad_()
    y = quantizer(x)
    (y * torch.from_numpy(case.inputs['upstream'])).sum().backward()
    case.check('xhat', y.detach())
    case.check('scale_used', quantizer.scale.detach())
    case.check('grad_x', x.grad)
    case.check('grad_scale', quantizer.scale.grad)


def test_learnable_is_the_scale_and_keeps_its_identity():
    quantizer = LSQ(4)
    scale = quantizer.learnable()['scale']
    quantizer.mode = 'observe'
    quantizer(torch.randn(100))
    quantizer.mode = 'quantize'
    quantizer.load_state_dict(make(torch.randn(3, 100), ch_axis=0).state_dict())
    assert quantizer.learnable()['scale'] is scale is quantizer.scale and scale.shape == (3,)


@pytest.mark.parametrize('ch_axis', [None, 0])
def test_training_lowers_the_error(ch_axis):
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((4, 2000))
    quantizer = make(x, ch_axis=ch_axis)
    before = mse_loss(quantizer(x), x).item()
    optimizer = torch.optim.Adam(quantizer.learnable().values(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        mse_loss(quantizer(x), x).backward()
        optimizer.step()
    assert mse_loss(quantizer(x), x).item() < 0.6 * before


@pytest.mark.parametrize('value', [-0.3, 0.0, -1e-30])
def test_scale_that_an_optimiser_pushed_through_zero(value):
    x = torch.randn(200)
    quantizer = make(x)
    with torch.no_grad():
        quantizer.scale.fill_(value)
    expected = max(abs(value), torch.finfo(torch.float32).eps)
    # without gradients the parameter stays as it is, but its magnitude counts
    with torch.no_grad():
        y = quantizer(x)
    assert quantizer.scale.item() == pytest.approx(value)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), y)
    assert (quantizer.levels().diff() > 0).all()
    torch.testing.assert_close(quantizer(x).detach(), y)
    assert quantizer.scale.item() == pytest.approx(expected)


def test_two_uses_in_one_graph():
    # making the scale positive in place must not disturb a graph that is still needed
    quantizer = make(torch.randn(50))
    x = torch.randn(50, requires_grad=True)
    (quantizer(x) + quantizer(2 * x)).sum().backward()
    assert quantizer.scale.grad.isfinite()


def test_frozen_scale_needs_no_gradient():
    quantizer = make(torch.randn(50))
    quantizer.scale.requires_grad_(False)
    x = torch.randn(50, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and quantizer.scale.grad is None
