"""Histograms of activations with the levels of their quantizers, and ranges of channels with their groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ptqsam.analysis.statistics import Collector
from ptqsam.quantizers import Quantizer
from ptqsam.quantizers.cag import CAG

# bins between the smallest and the largest value
BINS = 256


class Histogram:
    """Counts of an activation's values in equal bins.

    Args:
        low: smallest value that will come.
        high: largest.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low = low
        # where all values are equal, they lie in the first bin
        self.width = (high - low) / BINS or 1.0
        self.counts: Tensor | int = 0

    def add(self, x: Tensor) -> None:
        """Count the values of an image."""
        index = ((x.detach().flatten() - self.low) / self.width).long().clamp_(0, BINS - 1)
        self.counts = self.counts + torch.bincount(index, minlength=BINS)

    def plain(self, role: str, quantizer: Quantizer) -> dict[str, Any]:
        """Content of `histograms.json` for a point.

        Args:
            role: of the point.
            quantizer: whose levels are noted, all of them together if channels have their own.
        """
        assert isinstance(self.counts, Tensor)
        return dict(
            role=role,
            edges=[self.low + self.width * i for i in range(BINS + 1)],
            counts=self.counts.tolist(),
            levels=quantizer.levels().detach().flatten().unique().tolist(),
            bits=quantizer.bits,
            quantizer=type(quantizer).__name__,
        )


def channel_groups(collectors: Mapping[str, Collector]) -> dict[str, Any]:
    """Content of `channel_groups.json`: of grouped inputs, the range and group of every channel.

    Args:
        collectors: path -> statistics of the activation.

    Returns:
        Path -> smallest and largest value of each channel, its group, and smallest and largest level of each group.
    """
    found = {}
    for path, collector in collectors.items():
        quantizer = collector.quantizer
        if isinstance(quantizer, CAG) and collector.channel_low is not None and collector.channel_high is not None:
            levels = quantizer.levels().detach()
            # a channel of each group
            first = [int((quantizer.group == group).nonzero()[0]) for group in range(len(quantizer.scale))]
            found[path] = dict(
                lo=collector.channel_low.tolist(),
                hi=collector.channel_high.tolist(),
                group=quantizer.group.tolist(),
                group_lo=levels[first, 0].tolist(),
                group_hi=levels[first, -1].tolist(),
            )
    return found
