"""Attention of SAM's ViT image encoder with decomposed relative positions. Methods.md 1.3."""

from typing import Self, cast

import torch
from torch import Tensor, nn

from ptqsam.modules.base import Build, PassThrough, QuantModule
from ptqsam.quantizers import Quantizer
from ptqsam.registry import QUANT_MODULES

# Attention maps are worked on in slices of at most this many elements: 64 MB stay near the cache, while the map
# of one global attention of SAM-B at 1024 pixels has 800 MB.
SLICE_ELEMENTS = 1 << 24


@QUANT_MODULES.register_module(name='segment_anything.modeling.image_encoder.Attention')
class QuantEncoderAttention(QuantModule):
    """Self-attention over an image or a window, (B, H, W, C) -> (B, H, W, C).

    q is quantized before it is scaled, and the relative positions are computed from the quantized q, as in PTQ4SAM,
    AHCPTQ and AHCQ-SAM (SAQ-SAM takes the unquantized one).
    """

    def __init__(self, module: nn.Module, qkv: nn.Module, proj: nn.Module, build: Build) -> None:
        super().__init__()
        self.num_heads = cast(int, module.num_heads)
        self.scale = cast(float, module.scale)
        self.use_rel_pos = cast(bool, module.use_rel_pos)
        if self.use_rel_pos:
            self.rel_pos_h = cast(nn.Parameter, module.rel_pos_h)
            self.rel_pos_w = cast(nn.Parameter, module.rel_pos_w)
        self.qkv = qkv
        self.q, self.k, self.v = (build(name, f'encoder.attn.{name}') for name in 'qkv')
        self.softmax = build('softmax', 'encoder.attn.softmax')
        self.proj = proj

    @classmethod
    def from_float(cls, module: nn.Module, build: Build) -> Self:
        """Convert the projections and put quantizers on q, k, v and the softmax output."""
        qkv = build.convert(module.get_submodule('qkv'), 'qkv', 'encoder.attn.qkv')
        proj = build.convert(module.get_submodule('proj'), 'proj', 'encoder.attn.proj')
        return cls(module, qkv, proj, build)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window, (B, H, W, C) -> (B, H, W, C)."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, batch * self.num_heads, height * width, -1).unbind(0)
        # the reshape above copied, nobody else reads q, k, v
        q, k, v = self.q(q, inplace=True), self.k(k, inplace=True), self.v(v, inplace=True)
        x = self.attend(q, k, v, (height, width))
        x = x.view(batch, self.num_heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(x.reshape(batch, height, width, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Softmax attention with relative positions.

        Args:
            q: queries (B * heads, H * W, head dim); k and v alike.
            k: keys.
            v: values.
            size: H, W.

        Returns:
            (B * heads, H * W, head dim)
        """
        if not slices_allowed(self.softmax) or torch.is_grad_enabled():
            return self.softmax(self.attention_map(q, k, size), inplace=True) @ v
        out = torch.empty_like(q)
        step = max(1, SLICE_ELEMENTS // (q.shape[1] * k.shape[1]))
        for start in range(0, q.shape[0], step):
            part = slice(start, start + step)
            attention = self.softmax(self.attention_map(q[part], k[part], size), inplace=True)
            torch.matmul(attention, v[part], out=out[part])
        return out

    def attention_map(self, q: Tensor, k: Tensor, size: tuple[int, int]) -> Tensor:
        """Softmax of scaled scores plus relative positions, (B * heads, H * W, H * W)."""
        from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

        attention = (q * self.scale) @ k.transpose(-2, -1)
        if self.use_rel_pos:
            attention = add_decomposed_rel_pos(attention, q, self.rel_pos_h, self.rel_pos_w, size, size)
        return attention.softmax(dim=-1)


def slices_allowed(quantizer: Quantizer | PassThrough) -> bool:
    """Whether a tensor may reach a quantizer in slices.

    Not while it observes, since an observer counts calls, and not while it is off, since products of slices need
    not equal the original's batched product bit for bit.
    """
    return isinstance(quantizer, Quantizer) and quantizer.mode == 'quantize'
