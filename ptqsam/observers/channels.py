"""Statistics of every channel of an activation: its range, its energy, and what the range of a group is searched on."""

import copy
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ptqsam.observers.base import Observer, Reduction, extremes
from ptqsam.observers.mse import SampleObserver
from ptqsam.observers.sampling import Sample, draw_evenly, keep_whole, on_device

# values of a call that an observer with samples keeps, all channels together, but some tokens at least
DRAWS, MIN_TOKENS = 1 << 15, 32
# bins of a sketch: evenly filled ones, and at each end ones whose share halves towards the extreme
EVEN_BINS, TAIL_BINS = 96, 16


@dataclass(frozen=True)
class WeightedSample(Sample):
    """Sample whose columns stand for given numbers of values.

    Attributes:
        weight: (P,) float32.
    """

    weight: Tensor

    def to(self, device: torch.device) -> 'WeightedSample':
        """The same on another device."""
        return WeightedSample(self.values.to(device), self.numel, self.weight.to(device))

    def weights(self) -> Tensor:
        """How many values of a row each column stands for, (P,) float32."""
        return self.weight


class ChannelStatistics(Observer):
    """Shows what it sees to another observer, channel by channel, and keeps the energy of the channels beside it.

    Observers of extremes see everything. Those that keep samples are given the extremes of every channel and some
    tokens drawn at random (128 kB a call, or 32 tokens), since per channel they would keep all of it; they choose from
    a sketch of all calls together, which takes a tenth of the time. Averages over calls are not taken from samples.

    Args:
        inner: gives the ranges; has a channel axis.
        seed: seed of the draws. Default 0.
    """

    sync: ClassVar[dict[str, Reduction]] = {**Observer.sync, 'squares': 'sum', 'tokens': 'sum'}
    collects_by = ('ch_axis', 'inner', 'seed')

    def __init__(self, inner: Observer, seed: int = 0) -> None:
        self.inner = inner
        self.seed = seed
        super().__init__(inner.bits, inner.symmetric, inner.ch_axis)

    def reset(self) -> None:
        """Forget everything; the draws start over as well."""
        super().reset()
        self.inner.reset()
        self.squares = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the energy and to what the other observer keeps."""
        assert self.ch_axis is not None
        rows = x.movedim(self.ch_axis, -1).flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        norm = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        self.squares = self.squares.to(x.device) + norm.double().square()
        self.tokens += len(rows)
        self.inner.turn = self.turn
        if not isinstance(self.inner, SampleObserver):
            self.inner.update(x)
            return extremes(x, self.ch_axis)
        lo, hi = rows.amin(0), rows.amax(0)
        self.inner.samples.append(draw_tokens(rows, lo, hi, self.seed + self.turn))
        self.inner.count += 1
        return lo, hi

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """What the other observer says."""
        sketch = self.sketch()
        return self.inner.choose_bounds() if sketch is None else self.choose(sketch, bin_masses())

    def energy(self) -> Tensor:
        """Mean square of every channel, (C,) float32."""
        return (self.squares / max(self.tokens, 1)).float()

    def sketch(self) -> Tensor | None:
        """A few values (C, K) that stand for the distribution of each channel, ascending; None without samples."""
        if not isinstance(self.inner, SampleObserver) or not self.inner.samples:
            return None
        return sketch_rows(*self.inner.pooled())

    def pooled_bounds(self, sketch: Tensor) -> tuple[Tensor, Tensor]:
        """What the other observer, which keeps samples, says about some channels taken together.

        Args:
            sketch: (c, K) of these channels.

        Returns:
            Lower and upper bound, 0-dim float32.
        """
        with torch.autocast(sketch.device.type, enabled=False):
            lo, hi = self.choose(sketch.reshape(1, -1), bin_masses().repeat(len(sketch)))
        return lo.float().squeeze(0), hi.float().squeeze(0)

    def choose(self, values: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (R,) that the other observer chooses for rows of values (R, P), given the shares of the columns."""
        observer, size = copy.copy(self.inner), values.shape[1]
        assert isinstance(observer, SampleObserver)
        observer.ch_axis = 0
        weight = (masses * (size / masses.sum())).to(values.device)
        observer.samples = [WeightedSample(values, size, weight)]
        return observer.choose_bounds()

    def synchronize(self) -> None:
        """Give every rank the statistics of all ranks."""
        super().synchronize()
        if isinstance(self.inner, SampleObserver):
            # it was given samples only; its extremes say on which device they belong
            self.inner.min_val, self.inner.max_val = self.min_val, self.max_val
        self.inner.synchronize()


def draw_tokens(rows: Tensor, lo: Tensor, hi: Tensor, seed: int) -> Sample:
    """The extremes of every channel, and tokens drawn at random, one in each of as many equal parts.

    Args:
        rows: (tokens, C).
        lo: (C,) smallest values.
        hi: (C,) largest values.
        seed: seed of the draw.

    Returns:
        Sample with C rows; all tokens if they are few.
    """
    tokens, channels = rows.shape
    draws = max(MIN_TOKENS, DRAWS // channels)
    if tokens <= draws + 2:
        return keep_whole(rows.t())
    drawn = rows[on_device(draw_evenly(tokens, draws, seed), rows.device)]
    weight = torch.full((draws + 2,), (tokens - 2) / draws, device=rows.device)
    weight[:2] = 1.0
    return WeightedSample(torch.cat([lo[None], hi[None], drawn]).t().float().contiguous(), tokens, weight)


@cache
def bin_masses() -> Tensor:
    """Share of the values that each column of a sketch stands for, (K,) float32."""
    tail = 2.0 ** -torch.arange(7, 7 + TAIL_BINS).double()
    even = torch.full((EVEN_BINS,), float(1 - 2 * tail.sum()) / EVEN_BINS, dtype=torch.float64)
    return torch.cat([tail.flip(0), even, tail]).float()


def sketch_rows(values: Tensor, weights: Tensor | None) -> Tensor:
    """Quantiles in the middle of bins that get narrow towards the ends.

    Args:
        values: (C, N), any order.
        weights: (N,), positive; None for one each.

    Returns:
        (C, K) ascending.
    """
    masses = bin_masses().to(values.device).double()
    middles = masses.cumsum(0) - masses / 2
    ordered, order = values.sort(1)
    weight = torch.ones_like(values) if weights is None else weights[order]
    below = weight.cumsum(1, dtype=torch.float64)
    targets = below[:, -1:] * middles
    return ordered.gather(1, torch.searchsorted(below, targets).clamp_(max=values.shape[1] - 1))
