"""Walks over the quantizers and quantized operators of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from ptqsam.modules.ops import QuantOp
from ptqsam.quantizers import Quantizer


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers of a model, in module order."""
    return (module for module in model.modules() if isinstance(module, Quantizer))


def quant_ops(model: nn.Module) -> Iterator[tuple[str, QuantOp, Quantizer]]:
    """Operators of a model whose weight is quantized: name, operator, quantizer of the weight."""
    for name, module in model.named_modules():
        if isinstance(module, QuantOp) and isinstance(module.weight_quantizer, Quantizer):
            yield name, module, module.weight_quantizer


def weight_quantizers(model: nn.Module) -> list[Quantizer]:
    """Quantizers of weights, in module order."""
    return [quantizer for _, _, quantizer in quant_ops(model)]


def act_quantizers(model: nn.Module) -> list[Quantizer]:
    """Quantizers of activations, in module order."""
    weights = {id(q) for q in weight_quantizers(model)}
    return [q for q in quantizers(model) if id(q) not in weights]


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute in float, locked quantizers included; afterwards all have the modes that they had."""
    modes = [(quantizer, quantizer.mode) for quantizer in quantizers(model)]
    try:
        for quantizer, _ in modes:
            quantizer.mode = 'off'
        yield
    finally:
        for quantizer, mode in modes:
            quantizer.mode = mode


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Let operators compute with the weights of the float model where a hook put others in their place."""
    replaced = [(op, op.weight) for op in model.modules() if isinstance(op, QuantOp) and op.original is not None]
    try:
        for op, _ in replaced:
            op.weight = nn.Parameter(cast(Tensor, op.original), requires_grad=False)
        yield
    finally:
        for op, weight in replaced:
            op.weight = weight
