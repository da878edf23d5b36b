"""Error of the values below a clip bound, as a function of the bound."""

import torch
from torch import Tensor

from ptqsam.functional import NORM

# outermost values that are knots of their own; the others share bins that grow inwards
MAX_KNOTS = 1024
# outermost gaps between knots that get more knots, and where
GAPS = 32
GAP_FRACTIONS = (0.0, 0.02, 0.08, 0.25, 0.55)
# entries of the largest temporary tensor, relative to the budget of the search
PAIRS_PER_BUDGET = 16


class ClipCost:
    """Table of ``T(a) = sum of w (a - v)^2.4 over v < a`` for bounds ``a <= 0``.

    Knots are the outermost values themselves, then means of growing bins. Between knots the 2.4th root of T is
    interpolated (cubic, with exact slopes): far below the bulk, where only single outliers are clipped, that root is
    a straight line. In the wide outermost gaps it bends just inside each value, so these have more knots.

    Args:
        values: (R, N) ascending.
        weights: (R, N), or None for one each.
        budget: bounds the temporary tensors.
    """

    def __init__(self, values: Tensor, weights: Tensor | None, budget: int) -> None:
        rows, size = values.shape
        limit = min(MAX_KNOTS, int((budget * PAIRS_PER_BUDGET / rows) ** 0.5))
        edges = torch.tensor(_bin_edges(size, max(limit, 16)), device=values.device)
        weight = torch.ones_like(values) if weights is None else weights
        mass = _bin_sums(weight, edges)
        # float64 sums lose nothing to cancellation that would move a mean out of its bin visibly
        mean = _bin_sums(weight.double() * values, edges) / mass.clamp(min=torch.finfo(torch.float32).tiny)
        # bounds are never positive; a last knot without mass lies at the largest bound
        mean = torch.nn.functional.pad(mean.float().clamp(max=0), (0, 1))
        self.knots, mass = _fill_gaps(mean, torch.nn.functional.pad(mass.float(), (0, 1)))
        self.root, self.slope = self._roots(mass)

    def _roots(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """2.4th root of T and its derivative at the knots."""
        excess = (self.knots.unsqueeze(2) - self.knots.unsqueeze(1)).clamp_(min=0)
        power = excess.pow(NORM - 1)
        derivative = NORM * (power @ mass.unsqueeze(2)).squeeze(2)
        cost = (power.mul_(excess) @ mass.unsqueeze(2)).squeeze(2)
        root = cost.pow(1 / NORM)
        # where nothing is clipped yet, the root starts as the straight line of the values at the knot
        start = mass.cumsum(1).pow(1 / NORM)
        slope = torch.where(cost > 0, derivative * cost.pow(1 / NORM - 1) / NORM, start)
        return root, slope

    def __call__(self, bound: Tensor) -> Tensor:
        """Error of the values below each bound.

        Args:
            bound: (R, ...), not positive.

        Returns:
            Same shape.
        """
        flat = bound.flatten(1)
        right = torch.searchsorted(self.knots, flat).clamp(1, self.knots.shape[1] - 1)
        left = right - 1
        start, end = self.knots.gather(1, left), self.knots.gather(1, right)
        width = (end - start).clamp(min=torch.finfo(torch.float32).tiny)
        t = ((flat - start) / width).clamp(0, 1)
        root_start, root_end = self.root.gather(1, left), self.root.gather(1, right)
        bend_start = self.slope.gather(1, left) * width - (root_end - root_start)
        bend_end = (root_end - root_start) - self.slope.gather(1, right) * width
        root = root_start + t * (root_end - root_start) + t * (1 - t) * ((1 - t) * bend_start + t * bend_end)
        return root.clamp(min=0).pow(NORM).view_as(bound)


def _fill_gaps(knots: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Put knots without mass into the outermost gaps of knots (R, B)."""
    gaps = min(GAPS, knots.shape[1] - 1)
    fractions = torch.tensor(GAP_FRACTIONS, device=knots.device)
    outer = knots[:, :gaps, None] + knots[:, : gaps + 1].diff(dim=1).unsqueeze(2) * fractions
    outer_mass = mass[:, :gaps, None] * (fractions == 0)
    filled = torch.cat([outer.flatten(1), knots[:, gaps:]], 1), torch.cat([outer_mass.flatten(1), mass[:, gaps:]], 1)
    return filled


def _bin_edges(size: int, bins: int) -> list[int]:
    """Edges of at most ``bins`` bins of 0..size: single elements first, then geometrically growing bins."""
    if size <= bins:
        return list(range(size + 1))
    single = bins // 4
    ratio = (size / single) ** (1 / (bins - single))
    return sorted({*range(single), *(round(single * ratio**step) for step in range(bins - single + 1))})


def _bin_sums(values: Tensor, edges: Tensor) -> Tensor:
    """Sums of (R, N) over the bins, float64."""
    sums = torch.nn.functional.pad(values.cumsum(1, dtype=torch.float64), (1, 0))
    return sums[:, edges].diff(dim=1)
