"""Search of a hybrid log-uniform quantizer's parameters for the output of the layer that its values go into."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from mmengine.dist import all_gather_object, broadcast_object_list
from torch import Tensor

from ptqsam.functional import MIN_SCALE, choose_qparams
from ptqsam.hybrid_functional import Hybrid, hybrid_table, published_table
from ptqsam.observers.base import Observer, Reduction
from ptqsam.observers.sampling import draw_in_proportion
from ptqsam.table_functional import Table, table_fake_quantize

Center = Literal['min', 'zero']

# published candidates: height of the knee as a share of the range, share of the codes for the log part
HEIGHTS = (0.1, 0.3, 0.5)
SHARES = (1 / 8, 1 / 4, 1 / 2)
# further ones: height of the knee in uniform steps, number of log codes
STEPS = (1.0, 1.5, 2.0)
COUNTS = (3, 4, 5, 6)
# log levels below 2^-14 of the knee are left out, of the published candidates too
MOST_CODES = 16
# values to keep of all calls together: 8 MB
BUDGET = 1 << 21
# of more values than that, a part is enough to find the candidates that are compared on all
COARSE, FINALISTS = 1 << 18, 6


class OutputSearch(Observer):
    """Parameters of `HLUQ` with the smallest mean squared error of ``x @ operand``.

    Candidates are the plain uniform quantizer with the range of the recipe's observer, and hybrid ones with that range,
    with the mean over calls of the smallest and the largest value, which is the published one, or with the smallest and
    the largest of all, because log levels leave fewer reasons to cut a tail off. The lowest published knee, a tenth of
    the range, is so high beyond 4 bits that the log levels below it are further apart than uniform ones; knees of 1 to
    2 uniform steps are therefore tried as well. All are compared on a seeded sample of token rows, the same number of
    every call.

    Args:
        bits: bit width of the quantizer.
        ranges: observer of the recipe, per tensor and not symmetric; belongs to the search from now on.
        center: where the log part begins, at the lower end of the range or at zero. Default 'min'.
        seed: seed of the draws. Default 0.

    Attributes:
        operand: (in, out), of the call that is being observed and, until `reset`, of the last one; None: the error is
            that of the values themselves.
        published: search as the released code does, call by call with the range so far; set before anything is seen.
        rows: of every call some token rows in random order, (R, in) float32.
        weights: what they count, (R,) float64 each.
        lo_sum: sum of the calls' smallest values.
        hi_sum: sum of their largest values.
        error_sum: sum over calls of the errors of the published candidates, float64.
    """

    sync: ClassVar[dict[str, Reduction]] = {
        **Observer.sync,
        'lo_sum': 'sum',
        'hi_sum': 'sum',
        'error_sum': 'sum',
        'rows': 'cat',
        'width': 'max',
        'weights': 'cat',
    }
    collects_by = ('bits', 'published', 'ranges', 'seed')

    def __init__(self, bits: int, ranges: Observer, center: Center = 'min', seed: int = 0) -> None:
        self.ranges = ranges
        self.center = center
        self.seed = seed
        self.published = False
        super().__init__(bits)

    def reset(self) -> None:
        """Forget everything, the operand too; the draws start over as well."""
        super().reset()
        self.ranges.reset()
        self.operand: Tensor | None = None
        self.rows: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.width = 1
        self.lo_sum, self.hi_sum = torch.zeros(()), torch.zeros(())
        self.error_sum = torch.zeros((), dtype=torch.float64)

    def synchronize(self) -> None:
        """Give every rank the statistics of all ranks."""
        super().synchronize()
        self.ranges.synchronize()
        # as many rows of a call as one process would have kept
        share = self._share(self.count)
        self.rows = [_first(part, share) for part in self.rows]
        self.weights = [_first(part, share) for part in self.weights]
        holders = all_gather_object(self.operand is not None)
        if any(holders) and not all(holders):
            operand = [self.operand]
            broadcast_object_list(operand, holders.index(True))
            self.operand = operand[0]

    def statistics(self) -> dict[str, Any]:
        """As in all; the search needs the operand, too, and to know how it is to be done."""
        return super().statistics() | dict(operand=self.operand, published=self.published)

    def update_product(self, x: Tensor, operand: Tensor | None) -> None:
        """Add a tensor to the statistics.

        Args:
            x: (..., in).
            operand: (in, out), kept by reference; None, or one for each map: the error is that of ``x`` itself.
        """
        self.operand = None if operand is None or operand.dim() != 2 else operand.detach()
        self.update(x)

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keep extremes and rows of the call, and show it to the recipe's observer."""
        self.ranges.turn = self.turn
        self.ranges.update(x)
        flat = x.reshape(-1, x.shape[-1]) if x.dim() else x.view(1, 1)
        lows, highs = flat.amin(1), flat.amax(1)
        lo, hi = lows.amin(), highs.amax()
        self.lo_sum = self.lo_sum.to(lo.device) + lo.float()
        self.hi_sum = self.hi_sum.to(hi.device) + hi.float()
        self.width = flat.shape[1]
        share = self._share(self.turn + 1)
        chosen, weights = draw_rows((highs - lows).double(), share, self.seed + self.turn)
        # in random order, so the first of a call are a sample, too
        self.rows = [*(_first(part, share) for part in self.rows), flat[chosen].float()]
        self.weights = [*(_first(part, share) for part in self.weights), weights]
        if self.published:
            with torch.autocast(x.device.type, enabled=False):
                tables = [published_table(part, self.bits) for part in self._published(self.count + 1)]
                self.error_sum = self.error_sum.to(x.device) + self._errors(tables, self.rows[-1], weights)
        return lo, hi

    def _share(self, calls: int) -> int:
        """Rows that are kept of each of so many calls."""
        return max(1, BUDGET // (max(calls, 1) * self.width))

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """Those of the recipe's observer."""
        return self.ranges.bounds()

    @torch.no_grad()
    def search(self) -> Hybrid:
        """The best candidate; of equally good ones the first, and the plain uniform quantizer before all others.

        Raises:
            GateError: no data was seen, or the data hold NaN or infinity.
        """
        lo, hi = self.bounds()
        scale, zero_point = choose_qparams(lo, hi, self.bits, symmetric=False)
        if self.published:
            return self._published(self.count)[int(self.error_sum.argmin())]
        uniform = Hybrid(scale, scale, torch.zeros_like(scale), zero_point, 0)
        candidates = [uniform, *self._hybrids(lo, hi)]
        with torch.autocast(scale.device.type, enabled=False):
            rows, weights = torch.cat(self.rows), torch.cat(self.weights)
            thin = rows.numel() // COARSE
            if thin > 1:
                errors = self._errors(
                    [hybrid_table(part, self.bits) for part in candidates], rows[::thin], weights[::thin]
                )
                best = errors[1:].argsort(stable=True)[:FINALISTS].sort().values.tolist()
                candidates = [uniform, *(candidates[1 + index] for index in best)]
            errors = self._errors([hybrid_table(part, self.bits) for part in candidates], rows, weights)
        return candidates[int(errors.argmin())]

    def _average_range(self, count: int) -> tuple[Tensor, Tensor]:
        """Mean over calls of the smallest and the largest value."""
        return self.lo_sum / count, self.hi_sum / count

    def _hybrids(self, lo: Tensor, hi: Tensor) -> Iterator[Hybrid]:
        """All hybrid candidates.

        Args:
            lo: lower end of the range of the recipe's observer.
            hi: upper end.
        """
        found = [(lo, hi), self._average_range(self.count), (self.min_val.float(), self.max_val.float())]
        # the same range again, from one call for example, has nothing new
        ranges = torch.stack([torch.stack(bounds) for bounds in found]).unique(dim=0)
        levels = 2**self.bits
        published = [min(MOST_CODES, round(share * levels)) for share in SHARES if share * levels >= 2]
        # at 2 and 3 bits, half of the codes at most
        counts = {*published, *(count for count in COUNTS if 2 * count <= levels)}
        for lo, hi in ranges:
            low = torch.zeros_like(lo) if self.center == 'zero' else lo
            for log_codes in sorted(counts):
                uniform_codes = levels - log_codes
                for height in (*HEIGHTS, *(steps / (steps + uniform_codes) for steps in STEPS)):
                    knee = height * (hi - low)
                    step = (hi - low - knee) / uniform_codes
                    if step >= MIN_SCALE:
                        yield Hybrid(step, knee, low, torch.zeros_like(lo, dtype=torch.int32), log_codes)

    def _published(self, count: int) -> list[Hybrid]:
        """The released code's candidates for the mean range of so many calls."""
        lo, hi = self._average_range(count)
        zero = torch.zeros_like(lo, dtype=torch.int32)
        span, top = (hi - lo).clamp(min=MIN_SCALE), 2**self.bits - 1
        return [
            Hybrid(span * (1 - height) / (top * (1 - share)), span * height, lo, zero, round(share * (top + 1)) + 1)
            for height in HEIGHTS
            for share in SHARES
            if share * (top + 1) >= 1
        ]

    def _errors(self, tables: Sequence[Table], rows: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean squared error of the output for each table, float64."""
        errors = []
        for table in tables:
            error = table_fake_quantize(rows, table).sub_(rows)
            if self.operand is not None:
                error = error @ self.operand.to(error)
            errors.append((error.square_().mean(1, dtype=torch.float64) * weights).mean())
        # of values so large that squares overflow, no candidate is better than the first
        return torch.stack(errors).nan_to_num(torch.inf)


def draw_rows(spread: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw token rows, half of them with a probability that grows with the spread of their values.

    A few tokens with huge values may have most of the error of a range that cuts them off. Nothing is read on the host.

    Args:
        spread: largest less smallest value of each row, (N,) float64.
        count: rows to draw; if there are no more, all are taken.
        seed: seed of the draw.

    Returns:
        Positions in random order, int64, and weights, float64: the mean of weight * error estimates that of all rows.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(min(len(spread), count), generator=generator)
    score = spread.square()
    # the constant is for rows without any spread
    score += score.mean() + torch.finfo(torch.float32).tiny
    chosen, weights = draw_in_proportion(score.unsqueeze(0), order, generator)
    return chosen[0], weights[0]


def _first(part: Tensor, count: int) -> Tensor:
    """The first rows of a tensor, without the memory of the others."""
    return part if len(part) <= count else part[:count].clone()
