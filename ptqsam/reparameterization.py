"""Ranges of channels moved onto each other between a LayerNorm and a linear layer: the algebra of RepQ-ViT."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptqsam.functional import MIN_SCALE, quant_range
from ptqsam.modules import QuantOp


@dataclass(frozen=True)
class ChannelGrids:
    """Grids of the channels of a tensor, and the one grid that they are moved onto.

    Attributes:
        scales: of the channels, (C,) float64, positive.
        zero_points: of the channels, (C,) float64, whole numbers; not always within the codes.
        scale: common scale, 0-dim float32.
        zero_point: common zero point, 0-dim int32, within the codes.
    """

    scales: Tensor
    zero_points: Tensor
    scale: Tensor
    zero_point: Tensor

    @property
    def ratio(self) -> Tensor:
        """What values of a channel are divided by, after the shift; (C,) float64."""
        return self.scales / self.scale

    @property
    def shift(self) -> Tensor:
        """What is added to values of a channel, (C,) float64."""
        return self.scales * (self.zero_points - self.zero_point)


def free_grids(lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False) -> ChannelGrids:
    """Grids with scale and zero point per channel, and their means.

    A channel's range need not contain zero: what its values are shifted by comes back through the bias of the layer.

    Args:
        lo: lower bound of every channel, (C,).
        hi: upper bound, (C,).
        bits: bit width.
        symmetric: the common zero point is 0. Default False.

    Source: RepQ-ViT (Li et al., ICCV 2023). Deviations: the mean zero point is that of the zero points within the codes
    (which all are where ranges contain zero), and is rounded, as in the paper; the released code does not.
    """
    lo, hi = lo.double(), hi.double()
    qmin, qmax = quant_range(bits, symmetric)
    # a dead channel has no range
    scales = ((hi - lo) / (qmax - qmin)).clamp(min=MIN_SCALE)
    zero_points = qmin - torch.round(lo / scales)
    # clamped: a channel that is nearly constant would decide alone
    common = torch.zeros_like(zero_points[0]) if symmetric else zero_points.clamp(qmin, qmax).mean().round()
    return ChannelGrids(scales, zero_points, scales.mean().float(), common.int())


def anchored_grids(lo: Tensor, hi: Tensor, cost: Tensor, bits: int, symmetric: bool = False) -> ChannelGrids:
    """Grids with a scale per channel and one zero point for all, so that zero stays zero.

    For each zero point, each channel has the smallest scale that covers its range and zero; taken is the zero point
    with the smallest sum of cost * scale^2, which is the squared rounding error of the layer's output but for a factor.

    Args:
        lo: lower bound of every channel, (C,).
        hi: upper bound, (C,).
        cost: squared norm of every column of the layer's weight, (C,).
        bits: bit width.
        symmetric: the common zero point is 0. Default False.
    """
    lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
    qmin, qmax = quant_range(bits, symmetric)
    zeros = torch.arange(qmin, qmax + 1, device=lo.device)[:, None]
    zeros = zeros[-qmin : 1 - qmin] if symmetric else zeros
    # at the ends of the codes there is no room for one of the signs: such scales are huge and, as long as every channel
    # costs something, never the best
    below, above = (room.double().clamp(min=1e-9) for room in (zeros - qmin, qmax - zeros))
    scales = torch.maximum(-lo / below, hi / above)
    cost = cost.double() + 1e-3 * cost.double().mean() + 1e-30
    best = (cost * scales.square()).sum(1).argmin()
    scales = scales[best].clamp(min=MIN_SCALE)
    zero = zeros[best, 0]
    return ChannelGrids(scales, zero.double().expand_as(scales), scales.mean().float(), zero.int())


@torch.no_grad()
def move_ranges(norm: nn.LayerNorm, op: QuantOp, grids: ChannelGrids) -> nn.LayerNorm:
    """Move the ranges of channels onto each other in a LayerNorm, and undo it in the linear layer behind it.

    Args:
        norm: with a weight; left as it is.
        op: linear layer. It gets new parameters: the float model, which shares the old ones, stays as it is.
        grids: without a shift where one of the two has no bias, or a hook has replaced the layer's weight.

    Returns:
        The norm to put in the place of the old one.
    """
    ratio, shift = grids.ratio, grids.shift
    moved, weight = copy.deepcopy(norm), op.weight.double()
    moved.weight = _fixed(norm.weight.double() / ratio, norm.weight)
    if norm.bias is not None:
        moved.bias = _fixed((norm.bias.double() + shift) / ratio, norm.bias)
    if op.bias is not None:
        op.bias = _fixed(op.bias.double() - weight @ shift, op.bias)
    op.weight = _fixed(weight * ratio, op.weight)
    if op.original is not None:
        op.original = (op.original.double() * ratio).to(op.original)
    return moved


def _fixed(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter that nobody learns, with the dtype of another."""
    return nn.Parameter(value.to(like), requires_grad=False)
