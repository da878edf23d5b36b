"""Statistics of activations and weights that say why a quantizer has a hard time.

Column of `statistics.csv` -> whose question it answers:

| column | question |
|---|---|
| `condition_number` (of weights) | AHCQ-SAM's ill-conditioned weights, which amplify errors of their inputs: ACNR |
| `skewness`, `kurtosis` (of `mlp.lin2.input`) | its skewed, heavy-tailed activations: HLUQ |
| `channel_spread` (of inputs of linear layers) | its variation between channels: CAG |
| `share_above_0.01`, `kurtosis` (of `softmax`) | its attention scores, many small and few large: LNQ; PTQ4SAM's AGQ |
| `bimodality_coefficient`, `peaks`, `bimodal` (of `decoder.token_to_image.k`) | PTQ4SAM's two modes of keys: BIG |
| `outlier_ratio` (of q and k of the decoder) | SAQ-SAM's outliers: PCC |

Activations are those of the float model; where a hook changes it without changing what it computes (BIG, RepQ-ViT),
behind that change: as the quantizers meet them.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqsam.analysis.channels import Arrange
from ptqsam.analysis.moments import Moments
from ptqsam.condition_number import condition_number
from ptqsam.evaluation.quantization_error import error_from_sums, error_sums
from ptqsam.fileio import write_text
from ptqsam.hooks.bimodal_integration import bimodality
from ptqsam.quantizers import Quantizer
from ptqsam.solver.freeze import channels_first
from ptqsam.solver.rules import Choice

# values that peaks are looked for in; the keys of a prompt at 1024 pixels are half as many
PEAK_VALUES = 1 << 20
# share of the magnitudes below the one that outliers are compared with
QUANTILE = 0.999
# PTQ4SAM counts attention scores above it
SCORE = 0.01
# magnitudes are counted by the sign-free upper half of their float32 bits: 8 bits of mantissa, 0.2 % at most
SHIFT, BINS = 15, 1 << 16


def peak_stride(x: Tensor) -> int:
    """Step between the values in which peaks are looked for; it leaves out no channel (last axis)."""
    stride = max(1, math.ceil(x.numel() / PEAK_VALUES))
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return stride


@dataclass(frozen=True)
class Statistics:
    """A row of `statistics.csv`; what does not apply to a point is None.

    Attributes:
        numel: values of a weight, or of an activation per image.
        skewness: 0 if symmetric.
        kurtosis: excess kurtosis, 0 for a normal distribution.
        bimodality_coefficient: Sarle's: 1/3 normal, 5/9 uniform; above that, two modes are likely.
        peaks: of the density, as BIG finds them.
        bimodal: whether BIG would call it bimodal; of the first image, for the decoder its first prompt.
        channel_spread: largest range of a channel over the median one; output channels of weights.
        outlier_ratio: largest magnitude over that of the 99.9 % quantile.
        share_above: share of the values above 0.01; of softmax outputs.
        condition_number: largest over smallest singular value; of weights, (out, rest).
        sqnr_db: of the quantized values against the float ones.
    """

    path: str
    role: str
    kind: str
    quantizer: str
    bits: int
    numel: int
    min: float
    max: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    bimodality_coefficient: float
    sqnr_db: float
    peaks: int | None = None
    bimodal: bool | None = None
    channel_spread: float | None = None
    outlier_ratio: float | None = None
    share_above: float | None = None
    condition_number: float | None = None


class Collector:
    """Collects the statistics of one activation, image by image.

    Args:
        choice: what the rules decided for the point.
        quantizer: the quantizer there.
        arrange: brings a tensor into the form (tokens, channels); None: it has no channels.

    Attributes:
        channel_low: smallest value per channel, (C,).
        channel_high: largest.
    """

    def __init__(self, choice: Choice, quantizer: Quantizer, arrange: Arrange | None) -> None:
        self.choice = choice
        self.quantizer = quantizer
        self.arrange = arrange
        self.low, self.high, self.moments, self.above = math.inf, -math.inf, Moments(), 0
        self.magnitudes: Tensor | None = None
        self.channel_low: Tensor | None = None
        self.channel_high: Tensor | None = None
        self.peaks: int | None = None
        self.errors: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Add what the point holds for an image."""
        x = x.detach().float()
        low, high = (float(bound) for bound in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.moments = self.moments + Moments.of(x)
        counts = magnitude_counts(x)
        self.magnitudes = counts if self.magnitudes is None else self.magnitudes + counts
        self.errors = self.errors + error_sums(x, self.quantizer.decode(self.quantizer.encode(x)))
        if self.peaks is None:
            prompt = x[0] if self.choice.point.role.startswith('decoder.') else x
            self.peaks = len(bimodality(prompt.flatten()[:: peak_stride(prompt)]).peaks)
        if self.arrange is None:
            self.above += int((x > SCORE).sum())
            return
        channels = self.arrange(x)
        lows, highs = channels.amin(0), channels.amax(0)
        if self.channel_low is not None and self.channel_high is not None:
            lows, highs = torch.minimum(lows, self.channel_low), torch.maximum(highs, self.channel_high)
        self.channel_low, self.channel_high = lows, highs

    def row(self, images: int) -> Statistics:
        """The statistics of all images."""
        assert self.magnitudes is not None and isinstance(self.errors, Tensor)
        spread = share = None
        if self.channel_low is not None and self.channel_high is not None:
            spread = spread_of(self.channel_high - self.channel_low)
        else:
            share = self.above / self.moments.count
        return Statistics(
            **_head(self.choice),
            numel=round(self.moments.count / images),
            min=self.low,
            max=self.high,
            **_shape(self.moments),
            sqnr_db=error_from_sums(self.errors).sqnr,
            peaks=self.peaks,
            bimodal=self.peaks == 2,
            channel_spread=spread,
            outlier_ratio=outlier_ratio(self.low, self.high, self.magnitudes),
            share_above=share,
        )


def weight_statistics(choice: Choice, weight: Tensor, quantized: Tensor, ch_axis: int | None) -> Statistics:
    """Statistics of a weight.

    Args:
        choice: what the rules decided for it.
        weight: of the float model.
        quantized: the same, quantized.
        ch_axis: axis of the output channels, None: there is one range for all of it.
    """
    weight = weight.detach().float()
    rows = channels_first(weight, 0 if ch_axis is None else ch_axis)
    low, high = (float(bound) for bound in torch.aminmax(weight))
    return Statistics(
        **_head(choice),
        numel=weight.numel(),
        min=low,
        max=high,
        **_shape(Moments.of(weight)),
        sqnr_db=error_from_sums(error_sums(weight, quantized)).sqnr,
        channel_spread=spread_of(rows.amax(1) - rows.amin(1)),
        outlier_ratio=outlier_ratio(low, high, magnitude_counts(weight)),
        condition_number=condition_number(torch.linalg.svdvals(rows.double())),
    )


def magnitude_counts(x: Tensor) -> Tensor:
    """How often each magnitude occurs, (65536,) int64; bins that are 0.4 % wide, see `quantile_of`."""
    # the bits of a positive float are ordered as its values are
    bits = x.abs().flatten().view(torch.int32) >> SHIFT
    return torch.bincount(bits, minlength=BINS)


def quantile_of(counts: Tensor, share: float) -> float:
    """Magnitude that a share of all does not exceed, to 0.2 %.

    Args:
        counts: of `magnitude_counts`.
        share: 0 to 1.
    """
    total = counts.cumsum(0)
    index = int(torch.searchsorted(total, math.ceil(share * int(total[-1]))))
    middle = torch.tensor([(index << SHIFT) + (1 << (SHIFT - 1)) if index else 0], dtype=torch.int32)
    return float(middle.view(torch.float32))


def outlier_ratio(low: float, high: float, magnitudes: Tensor) -> float:
    """Largest magnitude over that of the 99.9 % quantile; infinite if nearly all values are zero."""
    common = quantile_of(magnitudes, QUANTILE)
    return max(-low, high) / common if common > 0 else math.inf


def spread_of(ranges: Tensor) -> float:
    """Largest range of a channel over the median one; infinite if more than half of the channels are constant."""
    middle = float(ranges.double().quantile(0.5))
    return float(ranges.max()) / middle if middle > 0 else math.inf


def write_statistics(path: Path, rows: Sequence[Statistics]) -> None:
    """Write one CSV row per point.

    Args:
        path: CSV file, written atomically.
        rows: in the order of the rules' decisions.
    """
    names = [field.name for field in fields(Statistics)]
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow('share_above_0.01' if name == 'share_above' else name for name in names)
    for row in rows:
        table.writerow(cell(getattr(row, name)) for name in names)
    write_text(path, text.getvalue())


def cell(value: Any) -> str:
    """A value in a CSV file: floats with six digits; nothing for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ''
    return f'{value:.6g}' if isinstance(value, float) else str(value)


def _head(choice: Choice) -> dict[str, Any]:
    point = choice.point
    names = dict(path=point.path, role=point.role, kind=point.kind)
    return names | dict(quantizer=choice.quantizer.type, bits=choice.bits)


def _shape(moments: Moments) -> dict[str, Any]:
    names = ('mean', 'std', 'skewness', 'kurtosis', 'bimodality_coefficient')
    return {name: getattr(moments, name) for name in names}
