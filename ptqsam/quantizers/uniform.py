"""Uniform affine quantizer with fixed parameters (methods.md section 1.1)."""

import torch
from torch import Tensor

from ptqsam.functional import choose_qparams, dequantize, drop_mask, fake_quantize, quantize
from ptqsam.quantizers.base import Quantizer
from ptqsam.registry import QUANTIZERS


@QUANTIZERS.register_module()
class Uniform(Quantizer):
    """Equally spaced levels, zero among them; scale and zero point come from the observer. Args as in `Quantizer`."""

    @torch.no_grad()
    def lock(self, lo: Tensor, hi: Tensor) -> None:
        """Quantize with a given range from now on; calibration does not change it any more.

        Args:
            lo: lower bound, 0-dim or (C,).
            hi: upper bound, likewise.
        """
        self.lock_at(*choose_qparams(lo, hi, self.bits, self.symmetric))

    @torch.no_grad()
    def lock_at(self, scale: Tensor, zero_point: Tensor) -> None:
        """As `lock`, with the parameters themselves, which a range would not always give to the bit.

        Args:
            scale: positive, float32, 0-dim or (C,).
            zero_point: within the codes, int32, likewise.
        """
        self.take(scale, zero_point)
        self.locked = True
        self.mode = 'quantize'

    def used_scale(self) -> Tensor:
        """The scale that the arithmetic uses, positive.

        Raises:
            GateError: there are no parameters yet.
        """
        self.demand_parameters()
        return self.scale.detach()

    def fake_quantize(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Quantized values; straight-through gradient."""
        return self.quantize_where(None, x, inplace)

    def drop(self, x: Tensor) -> Tensor:
        """Quantize each value with probability `drop_prob`, in one pass with the quantization itself."""
        return self.quantize_where(drop_mask(x, self.drop_prob), x)

    def quantize_where(self, mask: Tensor | None, x: Tensor, inplace: bool = False) -> Tensor:
        """Quantize where a mask is true, everything if there is none."""
        return fake_quantize(x, self.used_scale(), self.zero_point, self.qmin, self.qmax, self.ch_axis, inplace, mask)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32."""
        return quantize(x, self.used_scale(), self.zero_point, self.qmin, self.qmax, self.ch_axis)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, float32."""
        return dequantize(codes, self.used_scale(), self.zero_point, self.ch_axis)

    def levels(self) -> Tensor:
        """All 2^bits values, ascending: (2^bits,), or (C, 2^bits) per channel."""
        scale = self.used_scale()
        codes = torch.arange(self.qmin, self.qmax + 1, dtype=torch.int32, device=scale.device)
        if self.ch_axis is None:
            return dequantize(codes, scale, self.zero_point)
        return dequantize(codes.expand(scale.numel(), -1), scale, self.zero_point, ch_axis=0)
