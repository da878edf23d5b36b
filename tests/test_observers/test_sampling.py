"""The weighted sample that stands for a large tensor."""

import pytest
import torch

from ptqsam.functional import choose_qparams, fake_quantize, lp_error, quant_range
from ptqsam.observers import MSE
from ptqsam.observers.sampling import DRAWS, EDGE, STRIDE, TAIL, WHOLE, draw_sample
from ptqsam.observers.search import search_range


def true_error(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int) -> float:
    """Error of a range over all of a tensor."""
    scale, zero = choose_qparams(lo.squeeze(), hi.squeeze(), bits, False)
    return lp_error(x, fake_quantize(x, scale, zero, *quant_range(bits, False))).item()


HEAVY = {
    'student3': lambda n: torch.distributions.StudentT(3.0).sample((n,)),
    'lognormal': lambda n: torch.randn(n).exp(),
    'gelu': lambda n: torch.nn.functional.gelu(2 * torch.randn(n)),
    'softmax': lambda n: (2.5 * torch.randn(n // 1000, 1000)).softmax(1),
    # channels with their own scale, as after a LayerNorm with a few large weights
    'channels': lambda n: torch.randn(n // 256, 256) * torch.logspace(-1, 1.5, 256),
}


@pytest.mark.parametrize('kind', HEAVY)
def test_sampled_search_is_nearly_as_good_as_the_full_one(kind):
    torch.manual_seed(0)
    x = HEAVY[kind](400_000)
    for bits in (4, 8):
        full = true_error(x, *search_range(x.reshape(1, -1), None, bits, False), bits)
        one_call, many_calls = MSE(bits), MSE(bits)
        one_call.update(x)
        for part in x.flatten().chunk(8):
            many_calls.update(part)
        assert true_error(x, *one_call.bounds(), bits) <= 1.02 * full
        assert true_error(x, *many_calls.bounds(), bits) <= 1.005 * full


@pytest.mark.parametrize('size', [WHOLE + 1, 70_001, 1_000_000])
def test_sample_stands_for_the_tensor(size):
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((size,))
    sample, lo, hi = draw_sample(x, 0)
    weights = sample.weights()
    assert (lo, hi) == (x.min(), x.max())
    assert sample.values.shape == (1, weights.numel())
    # the outermost values exactly
    ordered = x.sort().values
    assert torch.equal(sample.values[0, :TAIL], ordered[:TAIL])
    assert torch.equal(sample.values[0, -TAIL:], ordered[-TAIL:].flip(0))
    # totals
    assert abs(weights.sum().item() / size - 1) < 2 * TAIL / size + 1e-3
    for moment in (lambda v: v.abs(), lambda v: v**2, lambda v: (v > 1).float(), lambda v: (v - 6).clamp(min=0) ** 2.4):
        estimate = (moment(sample.values[0]) * weights).sum().item() / size
        assert estimate == pytest.approx(moment(x).mean().item(), rel=0.05)


def test_saturated_values_keep_their_weight():
    # half of the values are the maximum, as after a clamp: the exact tail must not swallow them
    x = torch.randn(100_000).clamp(max=0)
    sample, _, hi = draw_sample(x, 0)
    share = sample.weights()[sample.values[0] == hi].sum().item() / x.numel()
    assert share == pytest.approx(0.5, abs=0.02)


def test_shape_depends_on_the_size_only():
    shapes = {
        draw_sample(x, seed)[0].values.shape for x in (torch.zeros(50_000), torch.randn(50_000)) for seed in (0, 1)
    }
    assert shapes == {(1, 2 * TAIL + 2 * EDGE + (DRAWS - 2 * EDGE) // STRIDE)}


@pytest.mark.parametrize('size', [1, 100, WHOLE])
def test_small_tensors_are_kept_whole(size):
    x = torch.randn(size)
    sample, lo, hi = draw_sample(x, 0)
    assert torch.equal(sample.values[0], x) and sample.weights() is None
    assert (lo, hi) == (x.min(), x.max())
    assert sample.values.data_ptr() != x.data_ptr()


def test_layouts_and_dtypes():
    base = torch.randn(60, 50, 40)
    whole = base.flatten().sort().values
    for x in (base, base.transpose(0, 2), base[:, ::2], base.to(torch.bfloat16), base.double()):
        sample, lo, hi = draw_sample(x, 0)
        assert sample.values.dtype == torch.float32
        assert (lo, hi) == (x.min(), x.max())
        expected = x.flatten().float().sort().values[:TAIL]
        assert torch.equal(sample.values[0, :TAIL], expected)
    assert torch.equal(base.flatten().sort().values, whole)


def test_every_position_can_be_drawn():
    # float32 positions in a tensor of this size would all be even
    x = (torch.arange(1 << 25) % 2).float()
    sample, _, _ = draw_sample(x, 0)
    assert (sample.values[0] * sample.weights()).sum().item() / x.numel() == pytest.approx(0.5, abs=0.02)
