"""Pure tensor functions of the logarithmic quantizer of softmax outputs (AGQ, methods.md 3.2).

``code = round(-tau * log2(max(x, 1e-20) / scale))``, clamped to 0..zero, and ``x_hat = scale * 2^(-code / tau)``, but 0
for the code ``zero``. No logarithm is taken: ``(x / scale)^tau * sqrt(2)`` has the exponent ``-code``, which is read
off the bits of the float, and at most two square roots lead back. That costs a tenth of log2 and exp2 on CPU and gives
the same code on every device. Nothing here reads a tensor on the host.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ptqsam.pieces import ordered_like, pieces_of

TAUS = (1, 2, 4)
# what the published code puts in place of smaller values before the logarithm
FLOOR = 1e-20
# a value half-way between two levels, or what float32 makes of it, becomes the larger one
TIE = 1 + 2**-22


class LogGrid(NamedTuple):
    """Levels 0 and ``scale * 2^(-code / tau)``.

    Attributes:
        scale: largest level, positive, float32; 0-dim, or any shape that broadcasts.
        tau: codes per octave, 1, 2 or 4.
        zero: the code whose value is 0; all smaller codes have values of their own.
    """

    scale: Tensor
    tau: int
    zero: int

    @property
    def dtype(self) -> torch.dtype:
        """float32, as long as 2^-zero is a normal number."""
        return torch.float32 if self.zero < 126 else torch.float64

    @property
    def floor_counts(self) -> bool:
        """Whether a code other than the last may be as low as the floor."""
        return self.zero > 50 * self.tau

    @property
    def limit(self) -> Tensor:
        """Values above it are clipped: half a step above the largest level."""
        return self.scale * 2 ** (0.5 / self.tau)


def _to_powers(x: Tensor, grid: LogGrid, out: Tensor | None = None) -> Tensor:
    """``2^-code * sqrt(2)``, roughly: the exponent is minus the code. NaN stays NaN."""
    half_step = 2 ** (0.5 / grid.tau) * TIE
    inverse = half_step / grid.scale.to(grid.dtype)
    if grid.floor_counts:
        x = torch.clamp(x, min=FLOOR, out=out)
    y = torch.mul(x.to(grid.dtype), inverse, out=out if grid.dtype == torch.float32 else None)
    y.clamp_(2 ** (-grid.zero / grid.tau) * half_step, half_step)
    for _ in range(grid.tau // 2):
        y.mul_(y)
    return y


def _from_powers(y: Tensor, grid: LogGrid) -> Tensor:
    """Values of what `_to_powers` returned, in place."""
    # the mantissa is filled with ones, not zeros, because that keeps a NaN: 2^(1 - code), less half a unit of precision
    if grid.dtype == torch.float32:
        y.view(torch.int32).bitwise_or_((1 << 23) - 1)
    else:
        y.view(torch.int64).bitwise_or_((1 << 52) - 1)
    for _ in range(grid.tau // 2):
        y.sqrt_()
    # after the square roots: on CPU, that of 0 takes ten times as long as others
    threshold(y, 2 ** ((1.5 - grid.zero) / grid.tau), 0.0, inplace=True)
    return y.mul_(grid.scale.to(grid.dtype) * 2 ** (-1 / grid.tau))


def log_quantize(x: Tensor, grid: LogGrid) -> Tensor:
    """Codes of values.

    Args:
        x: any shape and floating dtype.
        grid: levels, one scale.

    Returns:
        int32, shape of ``x``, in 0..zero. NaN has no code and gets the one of 0.
    """
    y = _to_powers(x.detach().float().nan_to_num(0.0, torch.inf, -torch.inf), grid)
    if grid.dtype == torch.float32:
        return 127 - (y.view(torch.int32) >> 23)
    return (1023 - (y.view(torch.int64) >> 52)).to(torch.int32)


def log_dequantize(codes: Tensor, grid: LogGrid) -> Tensor:
    """Values of codes, float32, shape of ``codes``."""
    if grid.dtype == torch.float32:
        y = ((127 - codes.to(torch.int32)) << 23).view(torch.float32)
    else:
        y = ((1023 - codes.to(torch.int64)) << 52).view(torch.float64)
    return _from_powers(y, grid).float()


def log_candidates(x: Tensor, grid: LogGrid) -> Tensor:
    """Quantized values for many scales at once: ``x`` and ``grid.scale`` broadcast against each other."""
    return _from_powers(_to_powers(x, grid), grid).float()


def log_fake_quantize(x: Tensor, grid: LogGrid, inplace: bool = False, mask: Tensor | None = None) -> Tensor:
    """Quantize and dequantize without a gradient: equal to ``log_dequantize(log_quantize(x))`` bit for bit.

    On CPU in pieces that fit the cache, like its uniform counterpart.

    Args:
        x: values, any shape and floating dtype.
        grid: levels, one scale.
        inplace: overwrite ``x`` if it is float32 and there is no mask. Default False.
        mask: bool, shape of ``x``: finite values where it is false stay as they are. Default None: quantize all.

    Returns:
        float32, shape of ``x``. NaN stays NaN.
    """
    source = x.detach().float()
    out = source if mask is None and (inplace or source.dtype != x.dtype) else torch.empty_like(source)
    pieces = pieces_of([out, source if mask is None else ordered_like(source, out), *_ordered(mask, out)])
    weight = None if mask is None else torch.empty_like(pieces[0][0])
    for target, piece, *chosen in pieces:
        values = _from_powers(_to_powers(piece, grid, out=target), grid)
        if values is not target:
            target.copy_(values)
        if weight is not None:
            torch.lerp(piece, target, weight[: len(target)].copy_(chosen[0].view(torch.uint8)), out=target)
    return out


def _ordered(mask: Tensor | None, like: Tensor) -> list[Tensor]:
    """The mask, in the memory order of a tensor; nothing if there is none."""
    return [] if mask is None else [ordered_like(mask, like)]


class LearnedLogScale(torch.autograd.Function):
    """Fake quantization, of all values or where a mask is true, with gradients for input and logarithm of the scale.

    The rounding is straight-through, so inside the range ``d x_hat / dx = x_hat / x`` and the scale has no gradient;
    above the range it is the other way round. Kept for the backward pass: input and output, which the operations before
    and behind keep anyway, and the mask.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, tau: int, zero: int, mask: Tensor | None) -> Tensor:
        """Quantize where the mask is true, everywhere without one."""
        grid = LogGrid(log_scale.detach().exp(), tau, zero)
        out = log_fake_quantize(x, grid, mask=mask)
        ctx.save_for_backward(x, out, mask, grid.limit)
        ctx.floor_counts = grid.floor_counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of the logarithm of the scale."""
        x, out, mask, limit = ctx.saved_tensors
        grad_x, sums = torch.empty_like(out), []
        pieces = pieces_of(
            [grad_x, *(ordered_like(part, out) for part in (grads[0], x.float(), out)), *_ordered(mask, out)]
        )
        work = [torch.empty_like(pieces[0][0]) for _ in range(1 if mask is None else 3)]
        for target, *parts in pieces:
            sums.append(_backward_piece(target, parts, limit, ctx.floor_counts, [part[: len(target)] for part in work]))
        return grad_x.to(x.dtype), torch.stack(sums).sum(), None, None, None


def _backward_piece(
    grad_x: Tensor, parts: list[Tensor], limit: Tensor, floor_counts: bool, work: list[Tensor]
) -> Tensor:
    """Backward pass over one piece: writes the gradient of ``x``, returns that of the logarithm of the scale.

    Comparisons are float32: operations on boolean tensors take several times as long on CPU.
    """
    grad, x, out, *mask = parts
    weight, slope, clipped = work if mask else (grad, grad_x, work[0])
    quantized = weight.copy_(mask[0].view(torch.uint8)).mul_(grad) if mask else grad
    torch.mul(quantized, out, out=slope)
    clipped.copy_(x).gt_(limit).mul_(slope)
    grad_scale = clipped.sum()
    slope.sub_(clipped).div_(torch.clamp(x, min=FLOOR, out=clipped))
    if floor_counts:
        slope.mul_(clipped.copy_(x).ge_(FLOOR))
    if mask:
        torch.sub(grad, quantized, out=grad_x).add_(slope)
    return grad_scale
