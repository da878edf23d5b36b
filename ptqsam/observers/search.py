"""Search of the clip range with the smallest mean |x_hat - x|^2.4, for many rows at once.

The released code tries 100 widths x 2^bits zero points with a full quantization each (methods.md 1.2). Here a width
costs one pass whatever the number of zero points: zero is always on the grid, so inside the range the rounding error
of a value depends on the scale alone, and the zero point only says which values are clipped. With the values sorted,

    error(scale, zero) = below(lo) + inside(scale)[lo..hi] + above(hi),   lo = (qmin - zero) scale, hi = lo + width

where `inside` is a difference of prefix sums, exact, and `below` and `above`, the errors of the clipped values,
depend on one bound each and are read from a table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqsam.functional import MIN_SCALE, NORM, choose_qparams, quant_range
from ptqsam.observers.clip_cost import ClipCost
from ptqsam.observers.sampling import sort_values

# elements of the largest temporary tensor: 1 MB on CPU (second-level cache), 64 MB elsewhere
CPU_BUDGET, DEVICE_BUDGET = 1 << 18, 1 << 24
MAX_ROWS = 1024
# zero points tried at once; beyond that, every n-th first and then all near the best
MAX_ZEROS = 32
FINALISTS = 4


@dataclass
class Rows:
    """Sorted rows of one search, scaled by powers of two (which rounds nothing) so that all lie in -1..1.

    Attributes:
        values: (R, N) ascending.
        weights: (R, N), or None for one each.
        bits: bit width.
        symmetric: zero point fixed at 0.
        floor: (R, 1) smallest scale, in units of the row.
        budget: elements of the largest temporary tensor.
    """

    values: Tensor
    weights: Tensor | None
    bits: int
    symmetric: bool
    floor: Tensor
    budget: int

    def __post_init__(self) -> None:
        self.qmin, self.qmax = quant_range(self.bits, self.symmetric)
        self.below = ClipCost(self.values, self.weights, self.budget)
        flipped = None if self.weights is None else self.weights.flip(1)
        self.above = ClipCost(-self.values.flip(1), flipped, self.budget)

    def full_scale(self) -> Tensor:
        """Scale (R, 1) of the range that clips nothing."""
        lo, hi = self.values[:, :1].clamp(max=0), self.values[:, -1:].clamp(min=0)
        span = 2 * torch.maximum(-lo, hi) if self.symmetric else hi - lo
        return torch.maximum(span / (self.qmax - self.qmin), self.floor)

    def best_zero(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Error of each scale at its best zero point.

        Args:
            scale: (R, S).

        Returns:
            Error (R, S), and the zero point (R, S) as float.
        """
        rows, size = self.values.shape
        step = max(1, self.budget // (rows * size))
        parts = [self._best_zero(part) for part in scale.split(step, dim=1)]
        return torch.cat([error for error, _ in parts], 1), torch.cat([zero for _, zero in parts], 1)

    def _best_zero(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale.unsqueeze(2)
        prefix = self._prefix_errors(scale)
        if self.symmetric:
            zero = torch.zeros_like(scale)
            return self._errors(prefix, scale, zero).squeeze(2), zero.squeeze(2)
        stride = max(1, (self.qmax + 1) // MAX_ZEROS)
        grid = torch.arange(self.qmin, self.qmax + 1, stride, device=scale.device, dtype=scale.dtype)
        error, zero = self._smallest(prefix, scale, grid.expand(*scale.shape[:2], -1))
        if stride > 1:
            near = torch.arange(1 - stride, stride, device=scale.device, dtype=scale.dtype)
            error, zero = self._smallest(prefix, scale, (zero + near).clamp(self.qmin, self.qmax))
        return error.squeeze(2), zero.squeeze(2)

    def _prefix_errors(self, scale: Tensor) -> Tensor:
        """Sums (R, S, N + 1) of the rounding errors of the values before each position, in units of the scale."""
        rows, size = self.values.shape
        sums = self.values.new_empty(rows, scale.shape[1], size + 1)
        sums[:, :, 0] = 0
        error = sums[:, :, 1:]
        torch.mul(self.values.unsqueeze(1), scale.reciprocal(), out=error)
        error.sub_(error.round()).abs_().pow_(NORM)
        if self.weights is not None:
            error.mul_(self.weights.unsqueeze(1))
        return sums.cumsum_(2)

    def _smallest(self, prefix: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest error over the zero points (R, S, Z) and where, (R, S, 1) each."""
        error, index = self._errors(prefix, scale, zero).min(2, keepdim=True)
        return error, zero.gather(2, index)

    def _errors(self, prefix: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Error (R, S, Z) of zero points (R, S, Z) at scales (R, S, 1)."""
        lo, hi = (self.qmin - zero) * scale, (self.qmax - zero) * scale
        first = torch.searchsorted(self.values, lo.flatten(1)).view_as(zero)
        last = torch.searchsorted(self.values, hi.flatten(1), right=True).view_as(zero)
        inside = (prefix.gather(2, last) - prefix.gather(2, first)) * scale**NORM
        return inside + self.below(lo) + self.above(-hi)

    def exact_error(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Error (R,) float64 of one scale and zero point (R, 1) per row, by quantizing every value."""
        codes = torch.mul(self.values, scale.reciprocal()).round_().add_(zero).clamp_(self.qmin, self.qmax)
        error = codes.sub_(zero).mul_(scale).sub_(self.values).abs_().pow_(NORM)
        if self.weights is not None:
            error.mul_(self.weights)
        return error.sum(1, dtype=torch.float64)


# scales (R, S) -> error and zero point, (R, S) each
Score = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Trials:
    """Scales tried so far, with their errors and zero points, (R, S) each."""

    score: Score
    scale: Tensor
    error: Tensor
    zero: Tensor

    @classmethod
    def scan(cls, score: Score, scale: Tensor) -> 'Trials':
        """Try ascending scales (R, S)."""
        return cls(score, scale, *score(scale))

    def add(self, scale: Tensor) -> Tensor:
        """Try more scales (R, S); returns their errors."""
        error, zero = self.score(scale)
        self.scale = torch.cat([self.scale, scale], 1)
        self.error = torch.cat([self.error, error], 1)
        self.zero = torch.cat([self.zero, zero], 1)
        return error

    def brackets(self, count: int) -> tuple[Tensor, Tensor]:
        """Neighbouring scales around the best local minima of a scan, (R, count) each."""
        padded = torch.nn.functional.pad(self.error, (1, 1), value=torch.inf)
        is_minimum = (self.error <= padded[:, :-2]) & (self.error <= padded[:, 2:])
        best = self.error.masked_fill(~is_minimum, torch.inf).topk(count, dim=1, largest=False).indices
        last = self.scale.shape[1] - 1
        return self.scale.gather(1, (best - 1).clamp(min=0)), self.scale.gather(1, (best + 1).clamp(max=last))


def zoom(trials: Trials) -> None:
    """Refine a scan: 11 scales between the neighbours of the two best minima, then 7 around the best of each."""
    low, high = trials.brackets(2)
    for points in (11, 7):
        fraction = torch.arange(1, points + 1, device=low.device, dtype=low.dtype) / (points + 1)
        inner = low.unsqueeze(2) + (high - low).unsqueeze(2) * fraction
        error = trials.add(inner.flatten(1)).view_as(inner)
        best = inner.gather(2, error.argmin(2, keepdim=True)).squeeze(2)
        reach = (high - low) / (points + 1)
        low, high = best - reach, best + reach


def golden_section(trials: Trials) -> None:
    """Refine a scan by bounded scalar minimisation between the neighbours of its two best minima."""
    low, high = trials.brackets(2)
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    error_left, error_right = trials.add(left), trials.add(right)
    for _ in range(10):
        go_left = error_left < error_right
        low, high = torch.where(go_left, low, left), torch.where(go_left, right, high)
        fresh = torch.where(go_left, high - ratio * (high - low), low + ratio * (high - low))
        error = trials.add(fresh)
        left, right = torch.where(go_left, fresh, right), torch.where(go_left, left, fresh)
        error_left, error_right = torch.where(go_left, error, error_right), torch.where(go_left, error_left, error)


def grid_widths(bits: int) -> Tensor:
    """Relative widths of the full scan: the published 100 steps, finer ones below, and up to one code more above.

    The scale at which a range that clips nothing may still round its ends to codes is larger than that of the range
    itself by (2^bits - 1) / (2^bits - 2), which matters at 2 and 3 bits.
    """
    small = torch.logspace(-3.5, -2, 9)[:-1]
    large = torch.linspace(1, (2**bits - 1) / (2**bits - 2), 5)[1:]
    return torch.cat([small, torch.arange(1, 101) / 100, large])


def coarse_widths(bits: int) -> Tensor:
    """Relative widths of a coarse scan: 12 small ones evenly on a logarithmic scale, then 36 evenly."""
    largest = (2**bits - 1) / (2**bits - 2)
    return torch.cat([torch.logspace(-2.5, -0.7, 13)[:-1], torch.linspace(10**-0.7, largest, 36)])


def search_range(
    values: Tensor,
    weights: Tensor | None,
    bits: int,
    symmetric: bool,
    widths: Callable[[int], Tensor] = grid_widths,
    refine: Callable[[Trials], None] = zoom,
) -> tuple[Tensor, Tensor]:
    """Clip range of each row with the smallest sum of weight * |x_hat - x|^2.4.

    Args:
        values: (R, N) float32, finite, any order.
        weights: (R, N) or (N,), not negative; None for one each.
        bits: bit width.
        symmetric: codes around zero.
        widths: bits -> relative widths of the scan, ascending. Default: 112 widths, a superset of the published grid.
        refine: tries more scales around the best of the scan. Default `zoom`.

    Returns:
        Lower and upper bound, (R,) float32. Never worse than the smallest and largest value of the row.
    """
    budget = CPU_BUDGET if values.device.type == 'cpu' else DEVICE_BUDGET
    count = max(1, min(MAX_ROWS, budget // values.shape[1]))
    if weights is not None:
        weights = weights.expand_as(values)
    found = []
    for start in range(0, values.shape[0], count):
        part = slice(start, start + count)
        weight = None if weights is None else weights[part]
        found.append(_search_rows(values[part], weight, bits, symmetric, widths(bits), refine, budget))
    return torch.cat([lo for lo, _ in found]), torch.cat([hi for _, hi in found])


def _search_rows(
    values: Tensor,
    weights: Tensor | None,
    bits: int,
    symmetric: bool,
    widths: Tensor,
    refine: Callable[[Trials], None],
    budget: int,
) -> tuple[Tensor, Tensor]:
    """`search_range` of as many rows as the memory budget allows."""
    # rows below 2^-64 quantize to zero whatever the range, and 2^-exponent must not overflow
    exponent = torch.frexp(values.abs().amax(1, keepdim=True)).exponent.clamp(min=-64)
    values = torch.ldexp(values.contiguous(), -exponent)
    if weights is None:
        values = sort_values(values)
    else:
        values, order = values.sort(1)
        weights = weights.gather(1, order)
    floor = torch.ldexp(torch.full_like(values[:, :1], MIN_SCALE), -exponent)
    rows = Rows(values, weights, bits, symmetric, floor, budget)
    trials = Trials.scan(rows.best_zero, torch.maximum(rows.full_scale() * widths.to(values), floor))
    refine(trials)

    # the range that clips nothing goes first: it wins ties, and nothing worse can be chosen
    lo, hi = values[:, 0].clamp(max=0), values[:, -1].clamp(min=0)
    scale, zero = choose_qparams(lo, hi, bits, symmetric)
    scale, zero = torch.maximum(scale, floor[:, 0]), zero.to(scale)
    error = rows.exact_error(scale.unsqueeze(1), zero.unsqueeze(1))
    for index in trials.error.topk(FINALISTS, dim=1, largest=False).indices.split(1, dim=1):
        new_scale, new_zero = trials.scale.gather(1, index), trials.zero.gather(1, index)
        new_error = rows.exact_error(new_scale, new_zero)
        better = new_error < error
        error = torch.where(better, new_error, error)
        new_lo, new_hi = _bounds(new_scale[:, 0], new_zero[:, 0], rows.qmin, rows.qmax, symmetric)
        lo, hi = torch.where(better, new_lo, lo), torch.where(better, new_hi, hi)
    return torch.ldexp(lo, exponent[:, 0]), torch.ldexp(hi, exponent[:, 0])


def _bounds(scale: Tensor, zero: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clip range from which `choose_qparams` gets the same scale and zero point back."""
    if symmetric:
        half = scale * ((qmax - qmin) / 2)
        return -half, half
    return (qmin - zero) * scale, (qmax - zero) * scale
