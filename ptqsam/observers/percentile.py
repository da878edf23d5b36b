"""Ranges that leave out a share of the outermost values (methods.md section 1.2: PCT)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptqsam.errors import ConfigError
from ptqsam.functional import NORM, choose_qparams, quant_range
from ptqsam.observers.mse import SampleObserver
from ptqsam.registry import OBSERVERS


@OBSERVERS.register_module()
class Percentile(SampleObserver):
    """Range between the quantiles 1 - p and p of everything seen.

    Of several candidates p, the one with the smallest mean |x_hat - x|^2.4 is taken, per channel. (The released code
    never stores the best score, so its last candidate always wins.)

    Args:
        bits: bit width of the quantizer.
        symmetric: the quantizer's codes lie around zero. Default False.
        ch_axis: axis of the channels, None for one range. Default None.
        percentile: candidate or candidates p, in (0.5, 1]. Default (0.99, 0.999, 0.9999, 0.99999).
        seed: seed of the draws. Default 0.

    Raises:
        ConfigError: a percentile outside (0.5, 1].
    """

    def __init__(
        self,
        bits: int,
        symmetric: bool = False,
        ch_axis: int | None = None,
        percentile: float | Sequence[float] = (0.99, 0.999, 0.9999, 0.99999),
        seed: int = 0,
    ) -> None:
        candidates = tuple(percentile) if isinstance(percentile, Sequence) else (percentile,)
        if not candidates or not all(0.5 < p <= 1 for p in candidates):
            raise ConfigError(f'Percentile: {percentile} is not within (0.5, 1]; write for example 0.999')
        self.candidates = candidates
        super().__init__(bits, symmetric, ch_axis, seed)

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """Quantiles of the best candidate."""
        values, weights = self.pooled()
        values, order = values.sort(1)
        weight = torch.ones_like(values) if weights is None else weights[order]
        best_lo, best_hi = values[:, 0], values[:, -1]
        best = torch.full_like(best_lo, torch.inf, dtype=torch.float64)
        total = sum(sample.numel for sample in self.samples)
        for p in self.candidates:
            # each quantile is counted from its own end: the outermost values have exact weights
            lo = _outer_value(values, weight, (1 - p) * total)
            hi = -_outer_value(-values.flip(1), weight.flip(1), (1 - p) * total)
            error = self._error(values, weight, lo, hi)
            better = error < best
            best = torch.where(better, error, best)
            best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
        return self.per_tensor(best_lo), self.per_tensor(best_hi)

    def _error(self, values: Tensor, weight: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Sum (rows,) of weight * |x_hat - x|^2.4 for a range per row."""
        scale, zero = (param.unsqueeze(1) for param in choose_qparams(lo, hi, self.bits, self.symmetric))
        qmin, qmax = quant_range(self.bits, self.symmetric)
        codes = (values / scale).round_().add_(zero).clamp_(qmin, qmax)
        power = codes.sub_(zero).mul_(scale).sub_(values).abs_().pow_(NORM)
        return power.mul_(weight).sum(1, dtype=torch.float64)


def _outer_value(values: Tensor, weight: Tensor, count: float) -> Tensor:
    """Smallest value (rows,) at or below which weight of at least ``count`` lies; values (rows, N) ascending."""
    # a hair less, so that rounding does not push an exact rank to the next value
    target = torch.full_like(values[:, :1], count * (1 - 1e-9), dtype=torch.float64)
    index = torch.searchsorted(weight.cumsum(1, dtype=torch.float64), target).clamp(max=values.shape[1] - 1)
    return values.gather(1, index).squeeze(1)
