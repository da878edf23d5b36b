"""Soft rounding of weights: learn for each weight whether it goes up or down (AdaRound, Nagel et al., ICML 2020)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ptqsam.errors import ConfigError
from ptqsam.quantizers import Quantizer, Uniform

# ends of the stretched sigmoid, equation 23 of the paper: beyond 0 and 1, so that both are reached at finite alpha
LOWER, UPPER = -0.1, 1.1
SPAN = UPPER - LOWER
# magnitude of alpha for a weight in the middle of its step that nearest rounding takes down
JUST_BELOW = 1e-6


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """Position of a weight between its two nearest levels, `h` of equation 23.

    Args:
        alpha: any shape.

    Returns:
        `clamp(sigmoid(alpha) * 1.2 - 0.1, 0, 1)`, shape of `alpha`, without a gradient.
    """
    return _rectify(alpha.detach().sigmoid())


def _rectify(sigmoid: Tensor) -> Tensor:
    """Stretch and clamp, in place."""
    return sigmoid.mul_(SPAN).add_(LOWER).clamp_(0.0, 1.0)


def _slope(sigmoid: Tensor) -> Tensor:
    """Gradient of the rectified sigmoid, divided by `SPAN`; zero where it is clamped."""
    slope = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)
    # the kernel of clamping: one pass in place of two comparisons and a product
    return torch.ops.aten.hardtanh_backward(slope, sigmoid, -LOWER / SPAN, (1 - LOWER) / SPAN)


class _SoftWeight(torch.autograd.Function):
    """`(low + h * free) * scale` with the gradient of alpha."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, h: Tensor, slope: Tensor, low: Tensor, free: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(slope, free, scale)
        return torch.addcmul(low, h, free).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slope, free, scale = ctx.saved_tensors
        return (grads[0] * (scale * SPAN)).mul_(free).mul_(slope), *[None] * 5


class _Regulariser(torch.autograd.Function):
    """`sum(1 - |2 h - 1|^exponent)`; its gradient needs the same power, so that the forward pass computes both."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, h: Tensor, slope: Tensor, exponent: float) -> Tensor:
        centred = torch.mul(h, 2.0).sub_(1.0)
        distance = centred.abs()
        power = distance.pow(exponent - 1)
        value = torch.addcmul(power.new_ones(()), power, distance, value=-1).sum()
        ctx.save_for_backward(power.copysign_(centred).mul_(slope))
        ctx.factor = -2 * SPAN * exponent
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grads[0] * ctx.factor), None, None, None


class SoftRounding(nn.Module):
    """Weight between its two nearest levels; `hard` takes one of them. Methods.md 1.5.

    Weights beyond the range of the quantizer stay at its end, whatever alpha is. At first `soft` is the clipped weight
    and `hard` nearest rounding, exactly: where a weight lies in the middle of its step, alpha starts on the side to
    which nearest rounding goes.

    Args:
        weight: float weight.
        quantizer: its calibrated quantizer; the scale is copied, so that it must not change afterwards.

    Raises:
        ConfigError: the levels of the quantizer are not equally spaced.
        GateError: the quantizer has no scale yet.

    Attributes:
        alpha: parameter, float32, shape of the weight.
    """

    low: Tensor
    free: Tensor
    scale: Tensor
    nearest_up: Tensor

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        if not isinstance(quantizer, Uniform):
            raise ConfigError(
                f'{quantizer.name}: soft rounding needs equally spaced levels, {type(quantizer).__name__} has others; '
                'use Uniform for weights'
            )
        shape = [1] * weight.dim()
        if quantizer.ch_axis is not None:
            shape[quantizer.ch_axis] = -1
        scale, zero = quantizer.used_scale().view(shape), quantizer.zero_point.view(shape).float()
        # the same product as in `quantize`, so that the nearest level is the same to the last bit
        position = weight.detach().float() * scale.reciprocal()
        below = position.floor()
        up = position.round() > below
        code = below + zero
        free = (code >= quantizer.qmin) & (code < quantizer.qmax)
        alpha = -(SPAN / (position - below - LOWER) - 1).log()
        self.alpha = nn.Parameter(torch.where(up, alpha.clamp(min=0.0), alpha.clamp(max=-JUST_BELOW)))
        for name, tensor in {
            # integer part in units of the scale, 1 where the weight can move, and where nearest rounding goes
            'low': code.clamp(quantizer.qmin, quantizer.qmax).sub_(zero),
            'free': free.float(),
            'scale': scale.clone(),
            'nearest_up': up,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        # what `soft` computed, for the regulariser of the same iteration: alpha, its version, `h` and slope
        self._known: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def _rectified(self) -> tuple[Tensor, Tensor]:
        """`h` and its slope."""
        sigmoid = self.alpha.detach().sigmoid()
        slope = _slope(sigmoid)
        return _rectify(sigmoid), slope

    def soft(self) -> Tensor:
        """Weight with the gradient of alpha, equation 22: `(clamp(floor(w / s) + h + z, qmin, qmax) - z) * s`."""
        known = self._rectified()
        self._known = self.alpha, self.alpha._version, known
        return _SoftWeight.apply(self.alpha, *known, self.low, self.free, self.scale)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Weight on the grid, what the quantizer decodes from its codes; alpha = 0 goes up."""
        return torch.addcmul(self.low, self.free, (self.alpha >= 0).to(self.free.dtype)).mul_(self.scale)

    def regulariser(self, exponent: float) -> Tensor:
        """Distance from the grid, equation 24.

        Args:
            exponent: large at first, which moves only weights near a level, then smaller; above 1.

        Returns:
            `sum(1 - |2 h - 1|^exponent)` over all weights, 0-dim; zero when every `h` is 0 or 1.
        """
        known, self._known = self._known, None
        if known is None or known[0] is not self.alpha or known[1] != self.alpha._version:
            return _Regulariser.apply(self.alpha, *self._rectified(), exponent)
        return _Regulariser.apply(self.alpha, *known[2], exponent)

    @torch.no_grad()
    def unsettled(self) -> Tensor:
        """Share of weights whose `h` is neither 0 nor 1, 0-dim."""
        h = rectified_sigmoid(self.alpha)
        return ((h > 0) & (h < 1)).float().mean()

    @torch.no_grad()
    def flipped(self) -> Tensor:
        """Share of weights whose code is not that of nearest rounding, 0-dim."""
        return ((self.alpha >= 0) != self.nearest_up).float().mul_(self.free).mean()


def temperature(step: int, iters: int, warm_up: float = 0.2, b_range: tuple[float, float] = (20.0, 2.0)) -> float:
    """Exponent of the regulariser: constant during warm-up, then linear.

    Args:
        step: iteration, from 1.
        iters: number of iterations.
        warm_up: share of the iterations without regulariser. Default 0.2.
        b_range: first and last exponent. Default (20, 2).

    Returns:
        The exponent.
    """
    start, end = b_range
    begin = warm_up * iters
    if step < begin:
        return start
    return end + (start - end) * max(0.0, 1 - (step - begin) / max(iters - begin, math.ulp(1.0)))


def regulariser_weight(step: int, iters: int, warm_up: float, weight: float) -> float:
    """Factor of the regulariser in the loss.

    Args:
        step: iteration, from 1.
        iters: number of iterations.
        warm_up: share of the iterations without regulariser.
        weight: factor afterwards.

    Returns:
        0 during warm-up, then `weight`.
    """
    return 0.0 if step < warm_up * iters else weight
