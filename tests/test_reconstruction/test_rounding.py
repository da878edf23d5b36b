"""Soft rounding: golden vectors, the three states of a weight (start, soft, hard), gradients, schedules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ptqsam.errors import ConfigError
from ptqsam.modules import PassThrough, QuantConv2d, QuantConvTranspose2d, QuantLinear
from ptqsam.quantizers import Quantizer, Uniform
from ptqsam.reconstruction.rounding import SoftRounding, rectified_sigmoid, regulariser_weight, temperature
from tests import golden


def calibrated(weight: torch.Tensor, bits: int = 4, **settings) -> Uniform:
    """A weight quantizer that saw a weight."""
    quantizer = Uniform(bits, **{'ch_axis': 0, **settings})
    quantizer.mode = 'observe'
    quantizer(weight)
    quantizer.mode = 'quantize'
    return quantizer


def clipped(weight: torch.Tensor, quantizer: Uniform) -> torch.Tensor:
    """A weight cut to the range of its quantizer."""
    levels = quantizer.levels()
    if quantizer.ch_axis is None:
        return weight.clamp(levels[0], levels[-1])
    shape = [-1 if axis == quantizer.ch_axis else 1 for axis in range(weight.dim())]
    return weight.clamp(levels[:, 0].view(shape), levels[:, -1].view(shape))


@st.composite
def problems(draw) -> tuple[torch.Tensor, Uniform]:
    """A weight and a quantizer whose range may cut it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.sampled_from([(5, 12), (4, 3, 2, 2), (30,)]))
    weight = torch.randn(shape) * 10 ** draw(st.floats(-4, 3)) + draw(st.floats(-1, 1))
    if draw(st.booleans()):
        weight = (weight * 4).round() / 4  # weights on levels and exactly between two
    settings = {'ch_axis': draw(st.sampled_from([None, 0])), 'symmetric': draw(st.booleans())}
    quantizer = calibrated(weight, draw(st.sampled_from([2, 4, 8])), **settings)
    quantizer.scale *= draw(st.sampled_from([1.0, 0.4, 2.0]))
    if draw(st.booleans()):
        quantizer.scale.copy_(2.0 ** quantizer.scale.log2().round())
    return weight, quantizer


@pytest.mark.parametrize('entry', golden.cases('04_adaround'))
def test_golden(entry):
    case = golden.Case(entry)
    arrays = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    quantizer = Uniform(case.parameters['bits'], ch_axis=case.ch_axis)
    quantizer.load_state_dict({name: arrays[name] for name in ('scale', 'zero_point')})
    quantizer.mode = 'quantize'
    rounding = SoftRounding(arrays['w'], quantizer)
    case.check('alpha_init', rounding.alpha.detach())
    case.check('h_init', rectified_sigmoid(rounding.alpha))
    case.check('soft_init', rounding.soft().detach())
    case.check('hard_init', rounding.hard())
    case.check('rtn', quantizer(arrays['w']))
    with torch.no_grad():
        rounding.alpha.copy_(arrays['alpha_test'])
    case.check('h_test', rectified_sigmoid(rounding.alpha))
    case.check('hard_test', rounding.hard())
    soft = rounding.soft()
    case.check('soft_test', soft.detach())
    case.check('grad_alpha', torch.autograd.grad(soft, rounding.alpha, arrays['upstream'])[0])
    values = [case.parameters['lam'] * rounding.regulariser(float(b)) for b in arrays['b']]
    case.check('reg', torch.stack(values).detach())
    case.check('reg_grad', torch.stack([torch.autograd.grad(value, rounding.alpha)[0] for value in values]))


@pytest.mark.parametrize('entry', golden.cases('04_temperature'))
def test_golden_temperature(entry):
    case = golden.Case(entry)
    settings = case.parameters
    b_range = settings['b_start'], settings['b_end']
    ours = [temperature(int(t), settings['iters'], settings['warm_up'], b_range) for t in case.inputs['t']]
    case.check('b', ours)


@pytest.mark.parametrize(('iters', 'warm_up'), [(10, 0.0), (10, 0.2), (10, 1.0), (1, 0.2), (7, 0.5)])
def test_schedule(iters, warm_up):
    steps = range(1, iters + 1)
    exponents = [temperature(step, iters, warm_up, (20, 2)) for step in steps]
    assert exponents == sorted(exponents, reverse=True) and exponents[-1] == (2 if warm_up < 1 else 20)
    weights = [regulariser_weight(step, iters, warm_up, 0.01) for step in steps]
    assert weights == sorted(weights) and sum(weight == 0 for weight in weights) == sum(
        step < warm_up * iters for step in steps
    )


@settings(max_examples=60, deadline=None)
@given(problems())
def test_starts_as_the_clipped_weight_and_its_nearest_level(problem):
    weight, quantizer = problem
    rounding = SoftRounding(weight, quantizer)
    assert rounding.alpha.isfinite().all()
    torch.testing.assert_close(rounding.soft(), clipped(weight, quantizer), rtol=2e-6, atol=2e-6 * weight.abs().max())
    assert torch.equal(rounding.hard(), quantizer(weight))
    assert rounding.flipped() == 0


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0.1, 30))
def test_hard_is_a_neighbouring_level(problem, spread):
    weight, quantizer = problem
    rounding = SoftRounding(weight, quantizer)
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn_like(weight) * spread)
    hard = rounding.hard()
    codes = quantizer.encode(hard)
    assert torch.equal(quantizer.decode(codes), hard) and not hard.requires_grad
    step = rounding.scale.expand_as(weight)
    assert ((hard - clipped(weight, quantizer)).abs() <= step * (1 + 1e-4)).all()
    flipped = (codes != quantizer.encode(weight)).float().mean()
    torch.testing.assert_close(rounding.flipped(), flipped)


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(1.5, 20))
def test_settled_weights_are_hard_and_cost_nothing(problem, exponent):
    weight, quantizer = problem
    rounding = SoftRounding(weight, quantizer)
    with torch.no_grad():
        rounding.alpha.copy_(torch.where(torch.rand_like(weight) < 0.5, -3.0, 3.0))
    assert rounding.unsettled() == 0 and rounding.regulariser(exponent) == 0
    assert torch.equal(rounding.soft(), rounding.hard())
    with torch.no_grad():
        rounding.alpha.view(-1)[0] = 0.3
    assert rounding.unsettled() == pytest.approx(1 / weight.numel()) and rounding.regulariser(exponent) > 0.1


@pytest.mark.parametrize('exponent', [2.0, 3.5, 19.0])
def test_gradients(exponent):
    weight = torch.randn(4, 6)
    quantizer = calibrated(weight, 3)
    quantizer.scale *= 0.7
    rounding = SoftRounding(weight, quantizer).double()
    assert (rounding.free == 0).any()
    with torch.no_grad():
        # on both sides of the ends of the sigmoid, but not at them
        rounding.alpha.copy_(torch.linspace(-4, 4, 24).view(4, 6))

    def functions(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.functional_call(_Both(rounding, exponent), {'rounding.alpha': alpha}, ())

    assert torch.autograd.gradcheck(functions, (rounding.alpha,))


class _Both(nn.Module):
    """Soft weight and regulariser as one function."""

    def __init__(self, rounding: SoftRounding, exponent: float) -> None:
        super().__init__()
        self.rounding, self.exponent = rounding, exponent

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rounding.soft(), self.rounding.regulariser(self.exponent)


def test_regulariser_alone_settles_everything():
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    quantizer = calibrated(weight)
    rounding = SoftRounding(weight, quantizer)
    optimizer = torch.optim.Adam([rounding.alpha], lr=0.05)
    for step in range(1, 301):
        optimizer.zero_grad()
        rounding.regulariser(temperature(step, 300, 0.0)).backward()
        optimizer.step()
    assert rounding.unsettled() == 0 and rounding.flipped() < 0.02
    assert torch.equal(rounding.soft(), rounding.hard())


@pytest.mark.parametrize(
    ('module', 'kind', 'ch_axis', 'shape'),
    [
        (nn.Linear(6, 5), QuantLinear, 0, (2, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), QuantConv2d, 0, (1, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), QuantConvTranspose2d, 1, (1, 4, 5, 5)),
    ],
)
def test_operator_uses_the_soft_weight_and_freezes_the_hard_one(module, kind, ch_axis, shape):
    quantizer = calibrated(module.weight.detach(), ch_axis=ch_axis)
    op = kind(module, PassThrough(), quantizer)
    x = torch.randn(shape)
    nearest = op(x)
    op.rounding = SoftRounding(op.weight, quantizer)
    assert torch.equal(op.used_weight(), op.rounding.soft())
    op(x).square().sum().backward()
    assert op.rounding.alpha.grad.abs().sum() > 0 and op.weight.grad is None
    with torch.no_grad():
        op.rounding.alpha.neg_()
    hard = op.rounding.hard()
    op.freeze()
    assert op.rounding is None and op.frozen and torch.equal(op.weight, hard)
    assert torch.equal(quantizer.decode(quantizer.encode(op.weight)), op.weight)
    assert not torch.equal(op(x), nearest)
    assert not torch.equal(module.weight, op.weight)
    assert not any('rounding' in name for name in op.state_dict())


def test_refuses_levels_that_are_not_equally_spaced():
    class Other(Quantizer):
        encode = decode = levels = None

    with pytest.raises(ConfigError, match='equally spaced'):
        SoftRounding(torch.randn(3, 3), Other(4))
