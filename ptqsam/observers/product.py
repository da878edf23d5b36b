"""Search of a quantizer's scale and shape for the product that its values go into."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ptqsam.functional import MIN_SCALE, NORM
from ptqsam.observers.base import Observer, Reduction
from ptqsam.observers.sampling import draw_in_proportion, on_device

# elements of a map that are looked at closely, and for the first scan; maps up to the third size are small
SAMPLE, COARSE, SMALL = 1 << 18, 1 << 16, 1 << 12
# query rows to draw from one map at least: its operand has to be copied for them
ROWS = 8
# share of the draws that does not depend on the values
UNIFORM = 0.1
# local minima of the scan that are looked at closely, and where around each, in steps of the scan
MINIMA, AROUND = 5, (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8)
# then around the best of these, in steps of the scan, twice
ZOOMS = (0.06, 0.02)
# elements of the largest temporary tensor
CPU_BUDGET, DEVICE_BUDGET = 1 << 18, 1 << 25
# keeps a division from being one by zero
SMALLEST = torch.finfo(torch.float64).tiny

# scales (S, 1, 1, 1) -> a map quantized with each, (S, M, R, K)
Candidates = Callable[[Tensor], Tensor]


class Family(ABC):
    """Quantizers of attention maps that differ in a number, the shape, and in the scale.

    Attributes:
        shapes: the numbers.
        minima: local minima of a scan that are looked at closely.
        thinning: the scan of a map that is not small takes every n-th of the rows that were drawn.
        close: shapes that are looked at closely in maps that are not small, those with the smallest errors in the
            scan; None: all of them.
        pilots: shapes whose error on a row, at the largest scale, raises the chance that it is drawn.
    """

    shapes: tuple[float, ...]
    pilots: tuple[float, ...] = ()
    minima: ClassVar[int] = MINIMA
    thinning: ClassVar[int] = SAMPLE // COARSE
    close: ClassVar[int | None] = None

    @abstractmethod
    def lowest(self, largest: Tensor) -> Tensor:
        """Lower end of the interval for the scale, whose upper end is the largest value."""

    @abstractmethod
    def points(self, shape: float, small: bool) -> int:
        """Scales of the scan; small maps, whose error is less smooth and quickly computed, get more."""

    @abstractmethod
    def candidates(self, x: Tensor, shape: float | Tensor) -> Candidates:
        """Quantized values of a map (M, R, K) for many scales.

        Args:
            x: the map, float32.
            shape: one of `shapes`; where not all are looked at closely, it may be a tensor, 0-dim.
        """


class ProductSearch(Observer):
    """Scale and shape with the smallest mean |A_q V - A V|^2.4.

    Every call is searched while it is shown, on a seeded sample of query rows where the map is large. Per shape, the
    mean of the scales and the sum of the errors over the calls are kept; the shape with the smallest sum wins.

    Args:
        bits: bit width of the quantizer.
        family: the quantizers to search among.
        seed: seed of the draws. Default 0.

    Attributes:
        family: may be replaced by another with the same shapes.
        scale_sum: (shapes,) float64.
        error_sum: likewise.
    """

    sync: ClassVar[dict[str, Reduction]] = {**Observer.sync, 'scale_sum': 'sum', 'error_sum': 'sum'}
    collects_by = ('family', 'seed')  # the bits are in the family

    def __init__(self, bits: int, family: Family, seed: int = 0) -> None:
        self.seed = seed
        self.family = family
        self.operand: Tensor | None = None
        super().__init__(bits)

    def reset(self) -> None:
        """Forget everything; the draws start over as well."""
        super().reset()
        self.scale_sum = torch.zeros(len(self.family.shapes), dtype=torch.float64)
        self.error_sum = torch.zeros_like(self.scale_sum)

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
        """Search the best scale of the call for every shape."""
        lo, hi = torch.aminmax(x)
        rows = draw_rows(x, self.operand, SAMPLE, self.seed + self.turn, self.family)
        scale, error = search_scales(rows, hi.float(), self.family)
        self.scale_sum = self.scale_sum.to(x.device) + scale
        self.error_sum = self.error_sum.to(x.device) + error
        return lo, hi

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """From 0 to the mean scale of the best shape."""
        scale = (self.scale_sum / self.count)[self.error_sum.argmin()]
        return torch.zeros_like(scale), scale

    def shape(self) -> float:
        """The shape with the smallest summed error."""
        return self.family.shapes[int(self.error_sum.argmin())]


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


def draw_rows(x: Tensor, operand: Tensor | None, budget: int, seed: int, family: Family | None = None) -> Rows:
    """Draw query rows of a large map; their number depends on the shapes only, and no value is read on the host.

    A few rows have most of the error. Mostly it is the sharp ones, so a row is drawn with a probability that grows with
    its largest value. Where a family has pilots, their errors count as well: among sharp rows, one that is spread over
    thousands of keys may be lost as a whole, and then has most of the error.

    Args:
        x: (..., Q, K).
        operand: (..., K, D) or None.
        budget: elements to draw, of the map or of the product, whichever has longer rows.
        seed: seed of the draw.
        family: the quantizers to search among. Default None: one without pilots.
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
    if family is not None and family.pilots:
        score = score / score.mean().clamp(min=SMALLEST) + _pilot_errors(x, operand, family)
    score += UNIFORM * score.mean() + MIN_SCALE
    order = torch.arange(min(maps, max(1, most // rows)))
    chosen, map_weight = draw_in_proportion(score.sum(1, keepdim=True).T, order, generator)
    query, weight = draw_in_proportion(score[chosen[0]], torch.arange(rows), generator)
    index = torch.unravel_index(chosen[0], lead)
    drawn = x[(*(part.unsqueeze(1) for part in index), query)].float()
    return Rows(drawn, None if operand is None else operand[index].float(), map_weight.T * weight)


def _pilot_errors(x: Tensor, operand: Tensor | None, family: Family) -> Tensor:
    """Errors of all rows, summed over the pilots, with mean 1 for each: (maps, Q) float64."""
    largest = x.amax().float().clamp(min=MIN_SCALE).view(1, 1, 1, 1)
    maps = x.flatten(0, -3)
    operands = None if operand is None else operand.flatten(0, -3)
    count = max(1, (CPU_BUDGET if x.device.type == 'cpu' else DEVICE_BUDGET) // maps[0].numel())
    score = torch.zeros(maps.shape[:2], dtype=torch.float64, device=x.device)
    for shape in family.pilots:
        errors = []
        for start in range(0, len(maps), count):
            part = slice(start, start + count)
            piece = maps[part].float()
            rows = Rows(piece, None if operands is None else operands[part].float(), None)
            errors.append(_row_errors(rows, family.candidates(piece, shape)(largest))[0])
        error = torch.cat(errors)
        score += error / error.mean().clamp(min=SMALLEST)
    return score


def search_scales(rows: Rows, largest: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Scale with the smallest error for every shape, from the lower end that the family says to the largest value.

    The error oscillates with the scale, about once per step of the codes, so that a bounded minimisation alone gets
    trapped (methods.md 15): a scan finds the best valleys, and only those are looked at closely.

    Args:
        rows: what the error is measured on.
        largest: the largest value, 0-dim.
        family: the quantizers to search among.

    Returns:
        Scale and error, float64 (shapes,) each. A shape that is not looked at closely has the best scale of the scan.
    """
    high = largest.clamp(min=MIN_SCALE)
    low = family.lowest(high)
    span = torch.log2(high / low)
    x, shapes = rows.x, family.shapes
    small = x.numel() <= SMALL
    coarse = rows if x.numel() <= COARSE else rows.thinned(family.thinning)
    searches = [_Search(rows, low, span, family.candidates(x, shape), family.minima) for shape in shapes]
    scans = []
    for shape in shapes:
        place = torch.linspace(0, 1, family.points(shape, small), device=x.device)
        scale = low * torch.exp2(span * place)
        scans.append(Scan(place, _errors(coarse, scale, family.candidates(coarse.x, shape))))
    if small or family.close is None or family.close >= len(shapes):
        place, error = _stack([search.closely(scan) for search, scan in zip(searches, scans, strict=True)])
    else:
        place, error = _stack([search.once(scan) for search, scan in zip(searches, scans, strict=True)])
        chosen = error.topk(family.close, largest=False).indices
        which = _constants(shapes, x).index_select(0, chosen).unbind()
        chosen_scans = (torch.stack(part).index_select(0, chosen).unbind() for part in zip(*scans, strict=True))
        found = [
            _Search(rows, low, span, family.candidates(x, shape), family.minima).closely(Scan(*scan))
            for shape, *scan in zip(which, *chosen_scans, strict=True)
        ]
        place, error = (old.scatter(0, chosen, new) for old, new in zip((place, error), _stack(found), strict=True))
    return low.double() * torch.exp2(span.double() * place.double()), error


class Scan(NamedTuple):
    """Relative places 0..1 of the interval for the scale, evenly, and the errors there, (P,) each."""

    place: Tensor
    error: Tensor


class _Search(NamedTuple):
    """Search of the scale of one shape, in ``low * 2^(0..span)``."""

    rows: Rows
    low: Tensor
    span: Tensor
    candidates: Candidates
    minima: int

    def once(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """Best place of a scan, and the error there, 0-dim each."""
        place = scan.place.index_select(0, scan.error.argmin(0, keepdim=True))
        return place[0], self._errors(place)[0]

    def closely(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """Best place around the best minima of a scan, and the error there, 0-dim each."""
        place, error = scan
        between = len(place) - 1
        padded = torch.nn.functional.pad(error, (1, 1), value=torch.inf)
        valley = (error <= padded[:-2]) & (error <= padded[2:])
        best = place[error.masked_fill(~valley, torch.inf).topk(self.minima, largest=False).indices]
        steps = torch.arange(-3, 4, device=place.device, dtype=place.dtype)
        tried = (best.unsqueeze(1) + _constants(AROUND, place) / between).flatten().clamp(0, 1)
        errors = self._errors(tried)
        for zoom in ZOOMS:
            more = (tried[errors.argmin()] + steps * zoom / between).clamp(0, 1)
            tried, errors = torch.cat([tried, more]), torch.cat([errors, self._errors(more)])
        smallest = errors.argmin()
        return tried[smallest], errors[smallest]

    def _errors(self, place: Tensor) -> Tensor:
        return _errors(self.rows, self.low * torch.exp2(self.span * place), self.candidates)


def _stack(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Places and errors of several shapes."""
    places, errors = zip(*pairs, strict=True)
    return torch.stack(places), torch.stack(errors)


def _constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Numbers on a device; from pinned memory, so that the host does not wait for a GPU."""
    return on_device(torch.tensor(values, dtype=like.dtype), like.device)


def _errors(rows: Rows, scales: Tensor, candidates: Candidates) -> Tensor:
    """Mean |A_q V - A V|^2.4 (S,) float64 for scales (S,)."""
    budget = CPU_BUDGET if rows.x.device.type == 'cpu' else DEVICE_BUDGET
    found = []
    for part in scales.split(max(1, budget // rows.x.numel())):
        power = _row_errors(rows, candidates(part.view(-1, 1, 1, 1)))
        found.append((power if rows.weight is None else power * rows.weight).mean((1, 2)))
    return torch.cat(found)


def _row_errors(rows: Rows, quantized: Tensor) -> Tensor:
    """Mean |A_q V - A V|^2.4 of each row (S, M, R) float64; the quantized values (S, M, R, K) are overwritten."""
    error = quantized.sub_(rows.x)
    if rows.operand is not None:
        error = error @ rows.operand
    return error.abs_().pow_(NORM).mean(3, dtype=torch.float64)
