"""Attention of SAM's two-way mask decoder. Methods.md 1.3."""

import math
from typing import Self, cast

from torch import Tensor, nn

from ptqsam.modules.base import Build, QuantModule, declare_child_roles
from ptqsam.registry import QUANT_MODULES

# One class serves four purposes; only the parent knows which.
declare_child_roles(
    'segment_anything.modeling.transformer.TwoWayAttentionBlock',
    {
        'self_attn': 'decoder.self',
        'cross_attn_token_to_image': 'decoder.token_to_image',
        'cross_attn_image_to_token': 'decoder.image_to_token',
    },
)
declare_child_roles(
    'segment_anything.modeling.transformer.TwoWayTransformer',
    {'final_attn_token_to_image': 'decoder.token_to_image'},
)


@QUANT_MODULES.register_module(name='segment_anything.modeling.transformer.Attention')
class QuantDecoderAttention(QuantModule):
    """Attention between prompt tokens and image tokens, in either direction.

    Roles are `decoder.<self|token_to_image|image_to_token>.<point>`.
    """

    positions = 'attention'
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, module: nn.Module, projections: dict[str, nn.Module], role: str, build: Build) -> None:
        super().__init__()
        self.num_heads = cast(int, module.num_heads)
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.q, self.k, self.v = (build(name, f'{role}.{name}') for name in 'qkv')
        self.softmax = build('softmax', f'{role}.softmax')

    @classmethod
    def from_float(cls, module: nn.Module, build: Build) -> Self:
        """Convert the projections and put quantizers on q, k, v and the softmax output."""
        role = build.role or 'decoder.attn'
        names = ('q_proj', 'k_proj', 'v_proj', 'out_proj')
        projections = {name: build.convert(module.get_submodule(name), name, f'{role}.{name}') for name in names}
        return cls(module, projections, role, build)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, q (B, N, C), k and v (B, M, C) -> (B, N, C)."""
        q = self._heads(self.q(self.q_proj(q)))
        k = self._heads(self.k(self.k_proj(k)))
        v = self._heads(self.v(self.v_proj(v)))
        attention = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        out = self.softmax(attention.softmax(dim=-1), inplace=True, operand=v) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads * c) -> (B, heads, N, c)"""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
