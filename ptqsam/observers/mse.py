"""Ranges with the smallest quantization error (methods.md section 1.2: MSE, AvgMSE, MSEFast, AvgMSEFast)."""

from typing import ClassVar

import torch
from torch import Tensor

from ptqsam.observers.base import Observer, Reduction, channel_rows
from ptqsam.observers.sampling import Sample, draw_sample, keep_whole
from ptqsam.observers.search import coarse_widths, golden_section, grid_widths, search_range, zoom
from ptqsam.registry import OBSERVERS


class SampleObserver(Observer):
    """Keeps what the search of a range needs of every call.

    Per tensor, large tensors are sampled (`draw_sample`, 12 kB a call). Per channel everything is kept: meant for
    weights, which are observed once; `reset` frees the memory.

    Args:
        bits: bit width of the quantizer.
        symmetric: the quantizer's codes lie around zero. Default False.
        ch_axis: axis of the channels, None for one range. Default None.
        seed: seed of the draws. Default 0.
    """

    sync: ClassVar[dict[str, Reduction]] = {**Observer.sync, 'samples': 'cat'}
    collects_by = ('ch_axis', 'seed')

    def __init__(self, bits: int, symmetric: bool = False, ch_axis: int | None = None, seed: int = 0) -> None:
        self.seed = seed
        super().__init__(bits, symmetric, ch_axis)

    def reset(self) -> None:
        """Forget everything; the draws start over as well."""
        super().reset()
        self.samples: list[Sample] = []

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a sample of the call."""
        if self.ch_axis is None:
            sample, lo, hi = draw_sample(x, self.seed + self.turn)
        else:
            sample = keep_whole(channel_rows(x, self.ch_axis))
            lo, hi = sample.values.amin(1), sample.values.amax(1)
        self.samples.append(sample)
        return lo, hi

    def pooled(self) -> tuple[Tensor, Tensor | None]:
        """All calls together: values (rows, N) and their weights (N,), None if all are one."""
        values = torch.cat([sample.values for sample in self.samples], 1)
        weights = [sample.weights() for sample in self.samples]
        if all(weight is None for weight in weights):
            return values, None
        ones = [
            values.new_ones(sample.values.shape[1]) if weight is None else weight
            for sample, weight in zip(self.samples, weights, strict=True)
        ]
        return values, torch.cat(ones)

    def per_tensor(self, bound: Tensor) -> Tensor:
        """Shape of a bound (rows,): 0-dim without channels."""
        return bound.squeeze(0) if self.ch_axis is None else bound


@OBSERVERS.register_module()
class MSE(SampleObserver):
    """Range with the smallest mean |x_hat - x|^2.4 over everything seen.

    One search over the pool of all calls, which is the error that the calibration set as a whole suffers; the released
    code searches per call and keeps the extremes of the ranges. The scan contains all ranges of the published grid
    (100 widths x all zero points) and is refined around its best. Args as in `SampleObserver`.
    """

    widths = staticmethod(grid_widths)
    refine = staticmethod(zoom)

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """Search on the pooled samples."""
        lo, hi = self.search(*self.pooled())
        return self.per_tensor(lo), self.per_tensor(hi)

    def search(self, values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Best range of each row; arguments and result as in `search_range`."""
        return search_range(values, weights, self.bits, self.symmetric, self.widths, self.refine)


@OBSERVERS.register_module()
class MSEFast(MSE):
    """As `MSE`, with 48 widths and a bounded scalar minimisation around the best two: half of the time.

    Bounded minimisation alone, as published, stops in local minima up to 46 times worse than the grid (methods.md 15).
    """

    widths = staticmethod(coarse_widths)
    refine = staticmethod(golden_section)


@OBSERVERS.register_module()
class AvgMSE(MSE):
    """Mean over calls of the range that is best for the call alone; every call counts once. Args as in `MSE`."""

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """Search every call and average the bounds."""
        if self.ch_axis is not None:
            bounds = [self.search(sample.values, sample.weights()) for sample in self.samples]
            return torch.stack([lo for lo, _ in bounds]).mean(0), torch.stack([hi for _, hi in bounds]).mean(0)
        # calls whose samples have one size are rows of one search
        groups: dict[int, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.values.shape[1], []).append(sample)
        bounds = [self.search(*_stack(group)) for group in groups.values()]
        return torch.cat([lo for lo, _ in bounds]).mean(), torch.cat([hi for _, hi in bounds]).mean()


@OBSERVERS.register_module()
class AvgMSEFast(AvgMSE):
    """As `AvgMSE`, with the search of `MSEFast`. Used for activations by SAQ-SAM."""

    widths = staticmethod(coarse_widths)
    refine = staticmethod(golden_section)


def _stack(samples: list[Sample]) -> tuple[Tensor, Tensor | None]:
    """Samples of one size as rows: values (rows, P) and weights (rows, P), None if all are one."""
    weights = [sample.weights() for sample in samples]
    values = torch.cat([sample.values for sample in samples])
    given = [weight for weight in weights if weight is not None]
    return values, torch.stack(given) if given else None
