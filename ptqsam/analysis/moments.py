"""Moments of the values of tensors that come one after the other; float64, merged without cancellation."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# values that are converted to float64 at a time: 32 MB
PIECE = 1 << 22


@dataclass(frozen=True)
class Moments:
    """Number and mean of values, and sums of powers of their deviations from the mean.

    Source of the merging: Pebay, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments, Sandia 2008, equations 2.1 to 2.9.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Moments of all values of a tensor."""
        total = cls()
        for piece in x.detach().flatten().split(PIECE):
            values = piece.double()
            mean = values.mean()
            deviation = values - mean
            square = deviation.square()
            sums = torch.stack([mean, square.sum(), (square * deviation).sum(), square.square().sum()])
            total = total + cls(len(values), *sums.tolist())
        return total

    def __add__(self, other: Self) -> Self:
        """Moments of both together."""
        if not self.count or not other.count:
            return other if other.count else self
        a, b = self.count, other.count
        n = a + b
        delta = other.mean - self.mean
        step = delta / n
        m2 = self.m2 + other.m2 + delta * step * a * b
        m3 = self.m3 + other.m3 + delta * step**2 * a * b * (a - b) + 3 * step * (a * other.m2 - b * self.m2)
        m4 = (
            self.m4
            + other.m4
            + delta * step**3 * a * b * (a * a - a * b + b * b)
            + 6 * step**2 * (a * a * other.m2 + b * b * self.m2)
            + 4 * step * (a * other.m3 - b * self.m3)
        )
        return type(self)(n, self.mean + b * step, m2, m3, m4)

    @property
    def std(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.m2 / self.count)

    @property
    def skewness(self) -> float:
        """Skewness: 0 for a symmetric distribution; NaN where all values are equal."""
        return math.sqrt(self.count) * self.m3 / self.m2**1.5 if self.m2 > 0 else math.nan

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis: 0 for a normal distribution; NaN where all values are equal."""
        return self.count * self.m4 / self.m2**2 - 3 if self.m2 > 0 else math.nan

    @property
    def bimodality_coefficient(self) -> float:
        """Sarle's coefficient, (skewness^2 + 1) / kurtosis: 1/3 normal, 5/9 uniform, 1 for two points.

        For few values with the correction that SAS publishes; NaN for fewer than four, or where all are equal.
        """
        n = self.count
        if n < 4 or self.m2 <= 0:
            return math.nan
        # unbiased estimates, as SAS has them
        skewness = self.skewness * math.sqrt(n * (n - 1)) / (n - 2)
        kurtosis = ((n + 1) * self.kurtosis + 6) * (n - 1) / ((n - 2) * (n - 3))
        return (skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
