"""Uniform quantizer with a learned scale (LSQ, Esser et al., ICLR 2020)."""

import torch
from torch import Tensor, nn

from ptqsam.functional import lsq_fake_quantize
from ptqsam.quantizers.uniform import Uniform
from ptqsam.registry import QUANTIZERS

SMALLEST = torch.finfo(torch.float32).eps


@QUANTIZERS.register_module()
class LSQ(Uniform):
    """`Uniform` whose scale is a parameter; the observer gives its first value, the zero point stays frozen.

    The gradient of the scale is multiplied by ``1 / sqrt(n qmax)``, n the values that share a scale (equation 4 of the
    paper, which averages over features; the codes of this field use the whole tensor). An optimiser may push the scale
    through zero: every forward that records gradients puts its magnitude, at least the float32 epsilon, back into the
    parameter, and everything else uses that magnitude. Args as in `Quantizer`.
    """

    scale: nn.Parameter

    def make_parameters(self) -> None:
        """Create the parameters without elements; the scale can be trained."""
        super().make_parameters()
        del self.scale
        self.scale = nn.Parameter(torch.empty(0))

    def used_scale(self) -> Tensor:
        """Magnitude of the scale, at least the float32 epsilon."""
        return super().used_scale().abs().clamp(min=SMALLEST)

    def quantize_where(self, mask: Tensor | None, x: Tensor, inplace: bool = False) -> Tensor:
        """Quantize where a mask is true; straight-through gradient for `x`, LSQ gradient for the scale."""
        if not (torch.is_grad_enabled() and self.scale.requires_grad):
            return super().quantize_where(mask, x, inplace)
        # without a graph and a version count: the value changes only right after an optimiser step went wrong
        self.scale.data.copy_(self.used_scale())
        shared = max(1, (self.whole or x.numel()) // self.scale.numel())
        factor = (shared * self.qmax) ** -0.5
        return lsq_fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax, factor, self.ch_axis, mask)

    def learnable(self) -> dict[str, nn.Parameter]:
        """The scale."""
        return {'scale': self.scale}
