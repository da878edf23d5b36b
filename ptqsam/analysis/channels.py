"""Which axis of an activation holds its channels."""

from collections.abc import Callable

from torch import Tensor, nn

from ptqsam.modules import QuantDecoderAttention, QuantEncoderAttention, QuantNorm, QuantOp
from ptqsam.modules.ops import QuantConv2d, QuantConvTranspose2d

Arrange = Callable[[Tensor], Tensor]


def channel_arrangement(target: nn.Module, path: str) -> Arrange | None:
    """How to bring the activation of a point into the form (tokens, channels).

    Args:
        target: SAM with quant modules.
        path: of the point.

    Returns:
        A function that does it, without copying where the layout allows; None for softmax outputs, which have keys in
        the place of channels.
    """
    parent, _, name = path.rpartition('.')
    owner = target.get_submodule(parent)
    if isinstance(owner, QuantOp | QuantNorm):
        image = isinstance(owner, QuantConv2d | QuantConvTranspose2d) or (
            isinstance(owner, QuantNorm) and not isinstance(owner.norm, nn.LayerNorm)
        )
        return _images if image else _tokens
    if name == 'softmax':
        return None
    if isinstance(owner, QuantDecoderAttention):
        return _tokens
    if isinstance(owner, QuantEncoderAttention):
        # (B * heads, N, head dim)
        return lambda x: _heads(x.unflatten(0, (-1, owner.num_heads)))
    return _heads


def _tokens(x: Tensor) -> Tensor:
    """(..., C)"""
    return x.flatten(0, -2)


def _images(x: Tensor) -> Tensor:
    """(B, C, H, W)"""
    return x.movedim(1, -1).flatten(0, -2)


def _heads(x: Tensor) -> Tensor:
    """(B, heads, N, head dim): a channel belongs to a head."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)
