"""Algebra of RepQ-ViT: grids that cover the channels, the same function, a smaller error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ptqsam.modules import QuantLinear
from ptqsam.modules.base import PassThrough
from ptqsam.quantizers import Uniform
from ptqsam.reparameterization import anchored_grids, free_grids, move_ranges

MINMAX = {'type': 'MinMax'}


@given(
    st.integers(2, 8),
    st.booleans(),
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-6, 3)), min_size=1, max_size=6),
    st.integers(0, 5),
)
def test_grids_cover_the_ranges_of_all_channels(bits, symmetric, ranges, seed):
    """The codes reach from end to end: free grids within half a step, anchored ones whole, with an exact zero."""
    lo = torch.tensor([low for low, _ in ranges])
    hi = lo + torch.tensor([10**width for _, width in ranges])
    cost = torch.rand(len(ranges), generator=torch.Generator().manual_seed(seed))
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    for name, grids in {
        'free': free_grids(lo, hi, bits, symmetric),
        'anchored': anchored_grids(lo, hi, cost, bits, symmetric),
    }.items():
        assert grids.scales.min() > 0 and torch.isfinite(grids.scales).all()
        assert qmin <= grids.zero_point <= qmax and grids.scale.dtype == torch.float32
        if symmetric:
            assert grids.zero_point == 0
        else:
            assert (grids.zero_point - grids.zero_points.clamp(qmin, qmax).mean()).abs() <= 0.5
        low, high = (grids.scales * (end - grids.zero_points) for end in (qmin, qmax))
        # float32 noise, and scales have a smallest value
        room = (0.5 * grids.scales if name == 'free' else 0) + 1e-7 + 1e-6 * torch.maximum(lo.abs(), hi.abs())
        assert (low <= lo + room).all() and (high >= hi - room).all()
    assert (grids.shift == 0).all()


@given(st.integers(2, 6), st.lists(st.tuples(st.floats(-10, 10), st.floats(0.01, 10)), min_size=1, max_size=5))
def test_anchored_zero_point_is_the_best(bits, ranges):
    lo, hi = (torch.tensor([f(*pair) for pair in ranges]) for f in (lambda a, _: a, lambda a, b: a + b))
    cost = torch.arange(1.0, len(ranges) + 1)
    grids = anchored_grids(lo, hi, cost, bits)
    top = 2**bits - 1
    errors = []
    for zero in range(top + 1):
        scales = []
        for low, high in zip(lo.clamp(max=0).tolist(), hi.clamp(min=0).tolist(), strict=True):
            below = -low / zero if zero else math.inf * -low if low else 0.0
            above = high / (top - zero) if zero < top else math.inf * high if high else 0.0
            scales.append(max(below, above))
        errors.append(sum(c * s**2 for c, s in zip(cost.tolist(), scales, strict=True)))
    assert float((cost * grids.scales.square()).sum()) <= min(errors) * 1.01


def make_norm_and_layer(gain, bias, outputs=8, seed=0):
    """LayerNorm, quantized layer behind it and tokens for them."""
    generator = torch.Generator().manual_seed(seed)
    norm, linear = nn.LayerNorm(len(gain)), nn.Linear(len(gain), outputs)
    with torch.no_grad():
        norm.weight.copy_(gain)
        norm.bias.copy_(bias)
        linear.weight.copy_(torch.randn(outputs, len(gain), generator=generator))
    op = QuantLinear(linear, Uniform(4, observer=MINMAX), PassThrough())
    return norm, op, torch.randn(200, len(gain), generator=generator)


@torch.no_grad()
def output_errors(norm, op, tokens, make_grids):
    """Squared error of the layer's output: with one min-max range, and reparameterised."""
    x, wanted = norm(tokens), op.operator(norm(tokens), op.weight)
    quantizer = op.input_quantizer
    quantizer.mode = 'observe'
    quantizer(x)
    quantizer.mode = 'quantize'
    per_tensor = (op(x) - wanted).square().sum()
    grids = make_grids(x.amin(0), x.amax(0))
    moved = move_ranges(norm, op, grids)
    quantizer.lock_at(grids.scale, grids.zero_point)
    torch.testing.assert_close(op.operator(moved(tokens), op.weight), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    return float(per_tensor), float((op(moved(tokens)) - wanted).square().sum())


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('anchored', [False, True])
def test_error_with_channels_of_different_ranges(seed, anchored):
    """Less than half of min-max's where ranges differ by orders of magnitude; the reason for the method."""
    generator = torch.Generator().manual_seed(seed)
    gain = torch.exp(2 * torch.randn(32, generator=generator))
    norm, op, tokens = make_norm_and_layer(gain, 0.3 * gain * torch.randn(32, generator=generator), seed=seed)
    cost = op.weight.detach().square().sum(0)
    make = (lambda lo, hi: anchored_grids(lo, hi, cost, 4)) if anchored else (lambda lo, hi: free_grids(lo, hi, 4))
    per_tensor, moved = output_errors(norm, op, tokens, make)
    assert moved < per_tensor / 2


def test_channels_far_from_zero():
    """They get no codes for zero, which a range per channel in the usual sense would have to contain."""
    gain, bias = torch.ones(16), torch.where(torch.arange(16) % 2 == 0, 20.0, -20.0)
    per_tensor, moved = output_errors(*make_norm_and_layer(gain, bias), lambda lo, hi: free_grids(lo, hi, 4))
    assert moved < per_tensor / 30


def test_all_channels_dead():
    for grids in (free_grids(*torch.zeros(2, 4), 4), anchored_grids(*torch.zeros(3, 4), 4)):
        assert (grids.scales > 0).all() and torch.isfinite(grids.ratio).all() and (grids.shift == 0).all()


def test_one_channel_does_not_decide_alone():
    """Neither one that is constant, whose zero point is far away, nor one that the layer ignores."""
    lo, hi = torch.tensor([-1.0, -1.0, -1.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert 5 <= free_grids(lo, hi, 4).zero_point <= 8
    grids = anchored_grids(torch.tensor([-1.0, 0.0]), torch.ones(2), torch.tensor([0.0, 1.0]), 4)
    assert grids.scales.max() <= 1 and grids.scales[1] < 0.1
