"""Ranges from the smallest and largest values (methods.md section 1.2: MinMax, AvgMinMax)."""

from typing import ClassVar

import torch
from torch import Tensor

from ptqsam.observers.base import Observer, Reduction, extremes
from ptqsam.registry import OBSERVERS


@OBSERVERS.register_module()
class MinMax(Observer):
    """Range from the smallest to the largest value of all calls. Args as in `Observer`."""

    collects_by = ('ch_axis',)

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing beyond the running extremes."""
        return extremes(x, self.ch_axis)

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """The running extremes."""
        return self.min_val, self.max_val


@OBSERVERS.register_module()
class AvgMinMax(Observer):
    """Range from the mean of the calls' minima to the mean of their maxima.

    Every call counts once, whatever its size. Used for activations by PTQ4SAM and AHCQ-SAM. Args as in `Observer`.
    """

    sync: ClassVar[dict[str, Reduction]] = {**Observer.sync, 'lo_sum': 'sum', 'hi_sum': 'sum'}
    collects_by = ('ch_axis',)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.lo_sum = torch.zeros(())
        self.hi_sum = torch.zeros(())

    def collect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the call's extremes to the sums."""
        lo, hi = extremes(x, self.ch_axis)
        self.lo_sum = self.lo_sum.to(lo.device) + lo.float()
        self.hi_sum = self.hi_sum.to(hi.device) + hi.float()
        return lo, hi

    def choose_bounds(self) -> tuple[Tensor, Tensor]:
        """The means over calls."""
        return self.lo_sum / self.count, self.hi_sum / self.count
