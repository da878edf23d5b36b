"""Search of a logarithmic quantizer's scale and granularity for the product that its values go into."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ptqsam.functional import MIN_SCALE, NORM
from ptqsam.log_functional import TAUS, LogGrid, log_candidates
from ptqsam.observers.base import Observer, Reduction
from ptqsam.observers.sampling import on_device

# elements of a map that are looked at closely, and for the first scan; maps up to the third size are small
SAMPLE, COARSE, SMALL = 1 << 18, 1 << 16, 1 << 12
# query rows to draw from one map at least: its operand has to be copied for them
ROWS = 8
# share of the draws that does not depend on the values
UNIFORM = 0.1
# candidates of the first scan within one period of the error, which is 1 / tau octaves; small maps, whose error is less
# smooth and quickly computed, get more
PER_PERIOD, PER_PERIOD_SMALL = 8, 40
# local minima of the scan that are looked at closely, and where around each, in steps of the scan
MINIMA, AROUND = 5, (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8)
# then around the best of these, in steps of the scan, twice
ZOOMS = (0.06, 0.02)
# elements of the largest temporary tensor
CPU_BUDGET, DEVICE_BUDGET = 1 << 18, 1 << 25


class ProductSearch(Observer):
    """Scale and tau of `AGQ` with the smallest mean |A_q V - A V|^2.4.

    Every call is searched while it is shown, on a seeded sample of query rows where the map is large. Per tau, the mean
    of the scales and the sum of the errors over the calls are kept; the tau with the smallest sum wins.

    Args:
        bits: bit width of the quantizer.
        symmetric: must be false; part of the interface.
        ch_axis: must be None; likewise.
        seed: seed of the draws. Default 0.

    Attributes:
        zero: the code of 0.
        scale_sum: (3,) float64, for tau 1, 2, 4.
        error_sum: likewise.
    """

    sync: ClassVar[dict[str, Reduction]] = {**Observer.sync, 'scale_sum': 'sum', 'error_sum': 'sum'}

    def __init__(self, bits: int, symmetric: bool = False, ch_axis: int | None = None, seed: int = 0) -> None:
        self.seed = seed
        self.zero = 2**bits - 1
        self.operand: Tensor | None = None
        super().__init__(bits, symmetric, ch_axis)

    def reset(self) -> None:
        """Forget everything; the draws start over as well."""
        super().reset()
        self.scale_sum = torch.zeros(len(TAUS), dtype=torch.float64)
        self.error_sum = torch.zeros(len(TAUS), dtype=torch.float64)

    def update_product(self, x: Tensor, operand: Tensor | None) -> None:
        """Add a map to the statistics.

        Args:
            x: left factor A (..., Q, K).
            operand: right factor V (..., K, D); None: the error is that of A itself.
        """
        self.operand = None if operand is None else operand.detach()
        try:
            # half precision would not tell the candidates apart
            with torch.autocast(x.device.type, enabled=False):
                self.update(x)
        finally:
            self.operand = None

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Search the best scale of the call for every tau."""
        lo, hi = torch.aminmax(x)
        rows = draw_rows(x, self.operand, SAMPLE, self.seed + self.count)
        scale, error = search_scales(rows, hi.float(), self.zero)
        self.scale_sum = self.scale_sum.to(x.device) + scale
        self.error_sum = self.error_sum.to(x.device) + error
        return lo, hi

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """From 0 to the mean scale of the best tau."""
        scale = (self.scale_sum / self.count)[self.error_sum.argmin()]
        return torch.zeros_like(scale), scale

    def tau(self) -> int:
        """The tau with the smallest summed error."""
        return TAUS[int(self.error_sum.argmin())]


class Rows(NamedTuple):
    """Query rows that stand for a map.

    Attributes:
        x: (M, R, K) float32.
        operand: (M, K, D), or None.
        weight: (M, R) float64: the mean of weight * error estimates the mean error of all rows; None: one each.
    """

    x: Tensor
    operand: Tensor | None
    weight: Tensor | None

    def thinned(self, ratio: int) -> 'Rows':
        """Every n-th row or, where there are too few, rows of every n-th map."""
        rows = min(ratio, self.x.shape[1])
        part = slice(None, None, -(-ratio // rows)), slice(None, None, rows)
        operand = None if self.operand is None else self.operand[part[0]]
        return Rows(self.x[part].contiguous(), operand, None if self.weight is None else self.weight[part])


def draw_rows(x: Tensor, operand: Tensor | None, budget: int, seed: int) -> Rows:
    """Draw query rows of a large map; their number depends on the shapes only, and no value is read on the host.

    A few sharp rows have most of the error, so a row is drawn with a probability that grows with its largest value.

    Args:
        x: (..., Q, K).
        operand: (..., K, D) or None.
        budget: elements to draw, of the map or of the product, whichever has longer rows.
        seed: seed of the draw.
    """
    while x.dim() < 3:
        x = x.unsqueeze(0)
    lead, (queries, keys) = x.shape[:-2], x.shape[-2:]
    if operand is not None:
        operand = operand.expand(*lead, *operand.shape[-2:])
    longest = keys if operand is None else max(keys, operand.shape[-1])
    maps, most = lead.numel(), max(ROWS, budget // longest)
    if maps * queries <= most:
        return Rows(x.flatten(0, -3).float(), None if operand is None else operand.flatten(0, -3).float(), None)
    rows = min(queries, max(ROWS, most // maps))
    generator = torch.Generator().manual_seed(seed)
    score = x.amax(-1).view(maps, queries).double().clamp(min=0).pow(NORM)
    score += UNIFORM * score.mean() + MIN_SCALE
    chosen, map_weight = _draw(score.sum(1, keepdim=True).T, min(maps, max(1, most // rows)), generator)
    query, weight = _draw(score[chosen[0]], rows, generator)
    index = torch.unravel_index(chosen[0], lead)
    drawn = x[(*(part.unsqueeze(1) for part in index), query)].float()
    return Rows(drawn, None if operand is None else operand[index].float(), map_weight.T * weight)


def _draw(score: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``count`` positions of each row (B, n) in proportion to the score, ascending, or take all of them.

    Returns:
        Positions (B, count), and mean score over score there.
    """
    batch, size = score.shape
    if count == size:
        return torch.arange(size, device=score.device).expand(batch, -1), torch.ones_like(score)
    offset = torch.rand(batch, count, generator=generator, dtype=torch.float64).add_(torch.arange(count))
    total = score.cumsum(1)
    point = on_device(offset / count, score.device) * total[:, -1:]
    position = torch.searchsorted(total, point).clamp_(max=size - 1)
    return position, score.mean(1, keepdim=True) / score.gather(1, position)


def search_scales(rows: Rows, largest: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Scale with the smallest error for every tau, in ``min(0.1, 0.01 max)..max``.

    The error oscillates with the scale, about once per step of the codes, so that a bounded minimisation alone gets
    trapped (methods.md 15): a scan finds the best valleys, and only those are looked at closely.

    Args:
        rows: what the error is measured on.
        largest: the largest value, 0-dim.
        zero: the code of 0.

    Returns:
        Scale and error, float64 (3,) each.
    """
    high = largest.clamp(min=MIN_SCALE)
    low = (0.01 * high).clamp(max=0.1)
    span = torch.log2(high / low)
    x = rows.x
    coarse = rows if x.numel() <= COARSE else rows.thinned(SAMPLE // COARSE)
    per_period = PER_PERIOD_SMALL if x.numel() <= SMALL else PER_PERIOD
    found = []
    for tau in TAUS:
        count = round(6.65 * per_period * tau)
        place = torch.linspace(0, 1, count, device=x.device)
        error = _errors(coarse, low * torch.exp2(span * place), tau, zero)
        padded = torch.nn.functional.pad(error, (1, 1), value=torch.inf)
        valley = (error <= padded[:-2]) & (error <= padded[2:])
        best = place[error.masked_fill(~valley, torch.inf).topk(MINIMA, largest=False).indices]
        steps = torch.arange(-3, 4, device=x.device, dtype=x.dtype)
        places = (best.unsqueeze(1) + _offsets(AROUND, x) / (count - 1)).flatten()
        tried, errors = _try(rows, low, span, places, tau, zero)
        for zoom in ZOOMS:
            centre = tried[errors.argmin()]
            more, more_errors = _try(rows, low, span, centre + steps * zoom / (count - 1), tau, zero)
            tried, errors = torch.cat([tried, more]), torch.cat([errors, more_errors])
        smallest = errors.argmin()
        found.append(torch.stack([low.double() * torch.exp2(span.double() * tried[smallest]), errors[smallest]]))
    scale, error = torch.stack(found, 1)
    return scale, error


def _try(rows: Rows, low: Tensor, span: Tensor, places: Tensor, tau: int, zero: int) -> tuple[Tensor, Tensor]:
    """Errors at relative places 0..1 of the interval, and the places."""
    places = places.clamp(0, 1)
    return places, _errors(rows, low * torch.exp2(span * places), tau, zero)


def _offsets(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Constants on a device; from pinned memory, so that the host does not wait for a GPU."""
    return on_device(torch.tensor(values, dtype=like.dtype), like.device)


def _errors(rows: Rows, scales: Tensor, tau: int, zero: int) -> Tensor:
    """Mean |A_q V - A V|^2.4 (S,) float64 for scales (S,)."""
    budget = CPU_BUDGET if rows.x.device.type == 'cpu' else DEVICE_BUDGET
    found = []
    for part in scales.split(max(1, budget // rows.x.numel())):
        error = log_candidates(rows.x, LogGrid(part.view(-1, 1, 1, 1), tau, zero)).sub_(rows.x)
        if rows.operand is not None:
            error = error @ rows.operand
        power = error.abs_().pow_(NORM).mean(3, dtype=torch.float64)
        found.append((power if rows.weight is None else power * rows.weight).mean((1, 2)))
    return torch.cat(found)
