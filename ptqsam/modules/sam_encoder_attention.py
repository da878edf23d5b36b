"""Attention of SAM's ViT image encoder with decomposed relative positions. Methods.md 1.3."""

from collections.abc import Iterator, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from ptqsam.modules.base import Build, PassThrough, QuantModule
from ptqsam.quantizers import Quantizer
from ptqsam.registry import QUANT_MODULES

# Attention maps are worked on in slices of at most this many elements, because the whole map of a global attention of
# SAM-B at 1024 pixels has 800 MB. Slices of 32 MB take 0.6 of the time on a CPU; smaller ones are hardly faster, but
# are more calls, each of which waits for all threads. A GPU is kept busy by 256 MB.
SLICE_ELEMENTS = 1 << 23
GPU_SLICE_ELEMENTS = 1 << 26


@QUANT_MODULES.register_module(name='segment_anything.modeling.image_encoder.Attention')
class QuantEncoderAttention(QuantModule):
    """Self-attention over an image or a window, (B, H, W, C) -> (B, H, W, C).

    q is quantized before it is scaled, and the relative positions are computed from the quantized q, as in PTQ4SAM,
    AHCPTQ and AHCQ-SAM (SAQ-SAM takes the unquantized one).
    """

    positions = 'windows'

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
        scaled, positions = q * self.scale, self.relative_positions(q, size)
        if not slices_allowed(self.softmax) or torch.is_grad_enabled():
            return self.softmax(attention_map(scaled, k, positions, size), inplace=True, operand=v) @ v
        out = torch.empty_like(q)
        for part in slices(q, k):
            heads = part[0]
            attention = attention_map(scaled[part], k[heads], [scores[part] for scores in positions], size)
            torch.matmul(self.softmax(attention, inplace=True), v[heads], out=out[part])
        return out

    def relative_positions(self, q: Tensor, size: tuple[int, int]) -> list[Tensor]:
        """Scores of every query for the rows and for the columns of keys; nothing without relative positions.

        Args:
            q: queries (B * heads, H * W, head dim).
            size: H, W.

        Returns:
            (B * heads, H * W, H) and (B * heads, H * W, W)
        """
        from segment_anything.modeling.image_encoder import get_rel_pos

        if not self.use_rel_pos:
            return []
        grid = q.unflatten(1, size)
        rows = torch.einsum('bhwc,hkc->bhwk', grid, get_rel_pos(size[0], size[0], self.rel_pos_h))
        columns = torch.einsum('bhwc,wkc->bhwk', grid, get_rel_pos(size[1], size[1], self.rel_pos_w))
        return [rows.flatten(1, 2), columns.flatten(1, 2)]


def attention_map(q: Tensor, k: Tensor, positions: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Softmax of scores plus relative positions, which are added in the original's order.

    Args:
        q: scaled queries (N, Q, head dim), all or some of an image or window.
        k: keys (N, H * W, head dim).
        positions: scores of these queries for rows (N, Q, H) and columns (N, Q, W) of keys, or nothing.
        size: H, W.

    Returns:
        (N, Q, H * W)
    """
    attention = q @ k.transpose(-2, -1)
    if positions:
        rows, columns = positions
        # in place the result is the same, but backward through a view that was written to would copy the whole map
        add = Tensor.add if torch.is_grad_enabled() else Tensor.add_
        attention = add(add(attention.unflatten(2, size), rows[..., None]), columns[..., None, :]).flatten(2)
    return attention.softmax(dim=-1)


def slices(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut an attention map into pieces: several heads with all of their queries, or some queries of one head."""
    most = SLICE_ELEMENTS if q.device.type == 'cpu' else GPU_SLICE_ELEMENTS
    queries, keys = q.shape[1], k.shape[1]
    heads = max(1, most // (queries * keys))
    step = max(1, most // (heads * keys))
    for first in range(0, q.shape[0], heads):
        for start in range(0, queries, step):
            yield slice(first, first + heads), slice(start, start + step)


def slices_allowed(quantizer: Quantizer | PassThrough) -> bool:
    """Whether a tensor may reach a quantizer in slices.

    Not while it observes, since an observer counts calls, and not while it is off, since products of slices need
    not equal the original's batched product bit for bit, and not with parameters per channel.
    """
    return isinstance(quantizer, Quantizer) and quantizer.mode == 'quantize' and quantizer.ch_axis is None
