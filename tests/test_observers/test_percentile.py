"""Percentile ranges."""

import pytest
import torch

from ptqsam.errors import ConfigError
from ptqsam.functional import choose_qparams, fake_quantize, lp_error, quant_range
from ptqsam.observers import Percentile


def test_one_percentile_is_a_quantile_of_the_pool():
    x = torch.randperm(1001).float() - 300
    observer = Percentile(4, percentile=0.99)
    for part in x.split(100):
        observer.update(part)
    lo, hi = observer.bounds()
    # 1 % of 1001 values lie at or beyond the 11th
    assert (lo.item(), hi.item()) == (-290.0, 690.0)


def test_everything_is_kept_at_percentile_one():
    x = torch.randn(500)
    observer = Percentile(4, percentile=1.0)
    observer.update(x)
    assert observer.bounds() == (x.min(), x.max())


@pytest.mark.parametrize('ch_axis', [None, 0])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_best_candidate_wins(ch_axis, bits):
    torch.manual_seed(0)
    x = torch.distributions.StudentT(2.5).sample((5, 3000))

    def error(percentile):
        observer = Percentile(bits, ch_axis=ch_axis, percentile=percentile)
        observer.update(x)
        scale, zero = choose_qparams(*observer.bounds(), bits, False)
        return lp_error(x, fake_quantize(x, scale, zero, *quant_range(bits, False), ch_axis), ch_axis=ch_axis)

    candidates = (0.9, 0.99, 0.999, 0.9999)
    best = torch.stack([error(p) for p in candidates]).amin(0)
    torch.testing.assert_close(error(candidates), best, rtol=1e-6, atol=0)
    # neither the first nor the last always wins
    torch.testing.assert_close(error(candidates[::-1]), best, rtol=1e-6, atol=0)


@pytest.mark.parametrize('size', [30_000, 1_000_000])
def test_sampled_tails_are_exact(size):
    torch.manual_seed(0)
    x = torch.randn(size)
    observer = Percentile(8, percentile=0.9999)
    observer.update(x)
    lo, hi = observer.bounds()
    rank = round(size * 1e-4)
    ordered = x.sort().values
    assert (lo, hi) == (ordered[rank - 1], ordered[-rank])


def test_one_sided_data():
    x = torch.randn(50_000).relu()
    observer = Percentile(4, percentile=0.999)
    observer.update(x)
    lo, hi = observer.bounds()
    assert lo == 0 and 2.8 < hi < 3.6


@pytest.mark.parametrize('percentile', [0.5, 1.2, 99, (), (0.9, 0.1)])
def test_bad_percentile(percentile):
    with pytest.raises(ConfigError, match='Percentile'):
        Percentile(4, percentile=percentile)
