"""Attention of TinyViT, the image encoder of MobileSAM, in timm's implementation."""

from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptqsam.modules.base import Build, PassThrough, QuantModule
from ptqsam.quantizers import Quantizer
from ptqsam.registry import QUANT_MODULES


@QUANT_MODULES.register_module(name='timm.models.tiny_vit.Attention')
class QuantTinyViTAttention(QuantModule):
    """Windowed self-attention with a learned bias per offset, (B, N, C) -> (B, N, C).

    The points are those of SAM's ViT encoder (methods.md 1.3), with the same roles.
    """

    positions = 'windows'

    def __init__(self, module: nn.Module, norm: nn.Module, qkv: nn.Module, proj: nn.Module, build: Build) -> None:
        super().__init__()
        self.num_heads = cast(int, module.num_heads)
        self.head_dims = cast(list[int], [module.key_dim, module.key_dim, module.val_dim])
        self.scale = cast(float, module.scale)
        self.fused = cast(bool, module.fused_attn)
        self.attention_biases = cast(nn.Parameter, module.attention_biases)
        self.attention_bias_idxs: Tensor
        self.register_buffer('attention_bias_idxs', cast(Tensor, module.attention_bias_idxs), persistent=False)
        self.norm = norm
        self.qkv = qkv
        self.q, self.k, self.v = (build(name, f'encoder.attn.{name}') for name in 'qkv')
        self.softmax = build('softmax', 'encoder.attn.softmax')
        self.proj = proj

    @classmethod
    def from_float(cls, module: nn.Module, build: Build) -> Self:
        """Convert the projections and put quantizers on q, k, v and the softmax output."""
        norm = build.convert(module.get_submodule('norm'), 'norm')
        qkv = build.convert(module.get_submodule('qkv'), 'qkv', 'encoder.attn.qkv')
        proj = build.convert(module.get_submodule('proj'), 'proj', 'encoder.attn.proj')
        return cls(module, norm, qkv, proj, build)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window, (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.head_dims, dim=3))
        q, k, v = self.q(q), self.k(k), self.v(v)
        # looked up on every call: a kept table goes stale when weights are loaded later
        bias = self.attention_biases[:, self.attention_bias_idxs]
        if self.fused and not _is_on(self.softmax) and not torch.is_grad_enabled():
            # the original never forms the attention map here, and neither must a model that is to be bit-equal
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            attention = torch.softmax((q * self.scale) @ k.transpose(-2, -1) + bias, dim=-1)
            out = self.softmax(attention, inplace=True, operand=v) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def _is_on(quantizer: Quantizer | PassThrough) -> bool:
    return isinstance(quantizer, Quantizer) and quantizer.mode != 'off'
