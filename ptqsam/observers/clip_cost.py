"""Error of the values below a clip bound, as a function of the bound."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqsam.functional import NORM

MAX_BINS = 1024
# entries of the largest temporary tensor, relative to the budget of the search
PAIRS_PER_BUDGET = 16
# outermost gaps between bins that get more knots, and where in the gap
GAPS = 24
GAP_FRACTIONS = (0.0, 0.02, 0.08, 0.25, 0.55)
TINY = torch.finfo(torch.float32).tiny


class ClipCost:
    """Table of ``T(a) = sum of w (a - v)^2.4 over v < a`` for bounds ``a <= 0``.

    The outermost values stay alone, the others are merged into bins that grow inwards. Between knots the 2.4th root
    of T is interpolated (cubic, with exact slopes): far below the bulk, where only single outliers are clipped, that
    root is a straight line. It bends just inside each value, so the wide outermost gaps have more knots.

    Args:
        values: (R, N) ascending.
        weights: (R, N), or None for one each.
        budget: bounds the temporary tensors.
    """

    def __init__(self, values: Tensor, weights: Tensor | None, budget: int) -> None:
        rows, size = values.shape
        limit = int((budget * PAIRS_PER_BUDGET / rows) ** 0.5) - GAPS * (len(GAP_FRACTIONS) - 1)
        edges = torch.tensor(_bin_edges(size, min(max(limit, 32), MAX_BINS)), device=values.device)
        weight = torch.ones_like(values) if weights is None else weights
        mass = _bin_sums(weight, edges)
        mean = _bin_sums(weight.double() * values, edges) / mass.clamp(min=TINY)
        # bounds are never positive; a last bin without mass lies at the largest bound
        mass, mean = pad(mass.float(), (0, 1)), pad(mean.float().clamp(max=0), (0, 1))
        self.knots = _fill_gaps(mean)
        self.root, self.slope = self._roots(mean, mass)

    def _roots(self, mean: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """2.4th root of T and its derivative at the knots."""
        excess = (self.knots.unsqueeze(2) - mean.unsqueeze(1)).clamp_(min=0)
        power = excess.pow(NORM - 1)
        derivative = NORM * (power @ mass.unsqueeze(2)).squeeze(2)
        cost = (power.mul_(excess) @ mass.unsqueeze(2)).squeeze(2)
        # where nothing is clipped yet, the root starts as the straight line of the values at the first knot
        start = (mass * (mean == mean[:, :1])).sum(1, keepdim=True).pow(1 / NORM)
        slope = torch.where(cost > 0, derivative * cost.clamp(min=TINY).pow(1 / NORM - 1) / NORM, start)
        return cost.pow(1 / NORM), slope

    def __call__(self, bound: Tensor) -> Tensor:
        """Error of the values below each bound.

        Args:
            bound: (R, ...), not positive.

        Returns:
            Same shape.
        """
        flat = bound.flatten(1)
        right = torch.searchsorted(self.knots, flat).clamp_(1, self.knots.shape[1] - 1)
        left = right - 1
        start = self.knots.gather(1, left)
        width = self.knots.gather(1, right).sub_(start).clamp_(min=TINY)
        t = (flat - start).div_(width).clamp_(0, 1)
        root = self.root.gather(1, left)
        rise = self.root.gather(1, right).sub_(root)
        bend_start = self.slope.gather(1, left).mul_(width).sub_(rise)
        bend_end = self.slope.gather(1, right).mul_(width).sub_(rise).neg_()
        bend = torch.lerp(bend_start, bend_end, t).mul_(t * (1 - t))
        return root.add_(bend).addcmul_(t, rise).clamp_(min=0).pow_(NORM).view_as(bound)


def _fill_gaps(knots: Tensor) -> Tensor:
    """Put more knots into the outermost gaps of knots (R, B)."""
    gaps = min(GAPS, knots.shape[1] - 1)
    fractions = torch.tensor(GAP_FRACTIONS, device=knots.device)
    outer = knots[:, :gaps, None] + knots[:, : gaps + 1].diff(dim=1).unsqueeze(2) * fractions
    return torch.cat([outer.flatten(1), knots[:, gaps:]], 1)


def _bin_edges(size: int, bins: int) -> list[int]:
    """Edges of at most ``bins`` bins of 0..size: single elements first, then geometrically growing bins."""
    if size <= bins:
        return list(range(size + 1))
    single = bins // 4
    ratio = (size / single) ** (1 / (bins - single))
    return sorted({*range(single), *(round(single * ratio**step) for step in range(bins - single + 1))})


def _bin_sums(values: Tensor, edges: Tensor) -> Tensor:
    """Sums of (R, N) over the bins; float64, since a difference of long float32 sums would lose single values."""
    return pad(values.cumsum(1, dtype=torch.float64), (1, 0))[:, edges].diff(dim=1)
