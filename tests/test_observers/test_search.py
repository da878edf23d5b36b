"""The range search against the brute-force grid that it replaces."""

import pytest
import torch

from ptqsam.functional import NORM, choose_qparams, fake_quantize, lp_error, quant_range
from ptqsam.observers.clip_cost import ClipCost
from ptqsam.observers.search import coarse_widths, golden_section, search_range


def brute_force(x: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Smallest error per row over the published grid: 100 widths x all zero points, each by full quantization."""
    qmin, qmax = quant_range(bits, symmetric)
    lo, hi = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    span = 2 * torch.maximum(-lo, hi) if symmetric else hi - lo
    best = torch.full_like(lo, torch.inf, dtype=torch.float64)
    for step in range(1, 101):
        scale = span * (step / 100) / (qmax - qmin)
        for zero in [0] if symmetric else range(qmin, qmax + 1):
            x_hat = fake_quantize(x, scale, torch.full_like(scale, zero), qmin, qmax, 0)
            best = torch.minimum(best, lp_error(x, x_hat, ch_axis=0))
    return best


def error_of(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Error per row of a range."""
    scale, zero = choose_qparams(lo, hi, bits, symmetric)
    return lp_error(x, fake_quantize(x, scale, zero, *quant_range(bits, symmetric), 0), ch_axis=0)


def make(kind: str, rows: int, size: int) -> torch.Tensor:
    """Rows of data like those of a SAM, and worse."""
    normal = torch.randn(rows, size)
    if kind == 'normal':
        return normal
    if kind == 'heavy':
        return torch.distributions.StudentT(2.0).sample((rows, size))
    if kind == 'outlier':
        normal[:, 0] = 300
        return normal
    if kind == 'skewed':
        return normal.exp() - 0.5
    if kind == 'gelu':
        return torch.nn.functional.gelu(2 * normal)
    if kind == 'relu':
        return normal.relu()
    if kind == 'negative':
        return -normal.abs()
    if kind == 'offset':
        return normal + 6
    if kind == 'bimodal':
        return normal + 8 * torch.randn(rows, size).sign()
    return (3 * normal).softmax(1)


KINDS = ('normal', 'heavy', 'outlier', 'skewed', 'gelu', 'relu', 'negative', 'offset', 'bimodal', 'softmax')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 6])
def test_as_good_as_brute_force(kind, symmetric, bits):
    torch.manual_seed(bits)
    size = 300 if bits == 6 else 900
    x = make(kind, 4, size)
    ours = error_of(x, *search_range(x, None, bits, symmetric), bits, symmetric)
    assert (ours <= 1.001 * brute_force(x, bits, symmetric)).all()
    assert (ours <= error_of(x, x.amin(1), x.amax(1), bits, symmetric) * (1 + 1e-6)).all()


@pytest.mark.parametrize('kind', ['normal', 'heavy', 'gelu'])
def test_as_good_as_brute_force_at_8_bits(kind):
    torch.manual_seed(0)
    x = make(kind, 1, 300)
    ours = error_of(x, *search_range(x, None, 8, False), 8, False)
    assert (ours <= 1.001 * brute_force(x, 8, False)).all()


@pytest.mark.parametrize('size', [1, 2, 3, 5, 7, 20, 48])
def test_few_values(size):
    # the fewer the values, the more local minima
    torch.manual_seed(size)
    x = torch.randn(40, size) * torch.rand(40, 1) + torch.randn(40, 1) * (torch.rand(40, 1) < 0.3)
    for bits, symmetric in ((2, False), (3, True), (4, False)):
        ours = error_of(x, *search_range(x, None, bits, symmetric), bits, symmetric)
        assert (ours <= 1.001 * brute_force(x, bits, symmetric) + 1e-12).all()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('bits', [2, 4, 6, 8])
def test_fast_search_is_close_and_never_worse_than_minmax(kind, bits):
    torch.manual_seed(bits)
    x = make(kind, 8, 1000)
    for symmetric in (False, True):
        fast = search_range(x, None, bits, symmetric, coarse_widths, golden_section)
        error = error_of(x, *fast, bits, symmetric)
        full = error_of(x, *search_range(x, None, bits, symmetric), bits, symmetric)
        assert (error <= error_of(x, x.amin(1), x.amax(1), bits, symmetric) * (1 + 1e-6)).all()
        assert error.sum() <= 1.05 * full.sum()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_weights_count_like_repetitions(bits):
    torch.manual_seed(0)
    x = torch.randn(3, 200)
    times = torch.randint(0, 4, (200,))
    repeated = x.repeat_interleave(times, dim=1)
    shared = search_range(x, times.float(), bits, False)
    each = search_range(x, times.float().expand(3, -1), bits, False)
    assert torch.equal(torch.stack(shared), torch.stack(each))
    ours = error_of(repeated, *shared, bits, False)
    torch.testing.assert_close(
        ours, error_of(repeated, *search_range(repeated, None, bits, False), bits, False), rtol=0.002, atol=0
    )


def test_rows_do_not_influence_each_other():
    # more rows than one block holds, and sizes apart by 10^30
    torch.manual_seed(0)
    x = torch.randn(1500, 30) * torch.logspace(-15, 15, 1500).unsqueeze(1)
    lo, hi = search_range(x, None, 4, False)
    for row in (0, 1, 700, 1023, 1024, 1499):
        alone = search_range(x[row : row + 1], None, 4, False)
        torch.testing.assert_close(torch.stack([lo[row], hi[row]]), torch.cat(alone))


def test_scaling_by_a_power_of_two_scales_the_range():
    x = torch.randn(5, 400)
    for factor in (2.0**-12, 2.0**20):
        lo, hi = search_range(x * factor, None, 4, False)
        assert torch.equal(torch.stack([lo, hi]), torch.stack(search_range(x, None, 4, False)) * factor)


def test_mirrored_data_gives_a_mirrored_error():
    torch.manual_seed(3)
    x = torch.randn(4, 500).exp()
    for bits in (3, 6):
        one = error_of(x, *search_range(x, None, bits, False), bits, False)
        other = error_of(-x, *search_range(-x, None, bits, False), bits, False)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_clip_cost_table(kind):
    torch.manual_seed(0)
    x = make(kind, 3, 3000).sort(1).values
    weights = torch.rand(3, 3000)
    bounds = x[:, :1].clamp(max=0) * torch.cat([1.1 - torch.linspace(0, 1.1, 300), torch.logspace(-4, 0, 100)])
    below = (bounds.unsqueeze(2) - x.double().unsqueeze(1)).clamp(min=0)
    for weight in (None, weights):
        exact = (below**NORM * (1 if weight is None else weight.unsqueeze(1))).sum(2)
        table = ClipCost(x, weight, 1 << 18)(bounds)
        # against the error of the bound itself and against that of clipping everything
        assert ((table - exact).abs() <= 0.01 * exact + 1e-6 * exact.amax(1, keepdim=True)).all()
