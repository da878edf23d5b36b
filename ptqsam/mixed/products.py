"""What bits are chosen for: the products of a model, and what their two factors take of each resource.

Integer hardware multiplies two factors: input and weight of an operator, q and k, softmax and v. Bit operations are
the multiplications times the bits of both, so a product's factors are decided together. Every factor lies in exactly
one product. A factor that the recipe leaves in floating point counts as 32 bits. Weights take what the packed
checkpoint stores of them (`ptqsam.checkpoint`): codes, and a float32 scale and an 8-bit zero point per channel.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptqsam.hardware import Meter
from ptqsam.modules.walk import act_quantizers, quant_ops
from ptqsam.solver.rules import Choice

FLOAT_BITS = 32
# last part of a factor's path -> of its product's
PRODUCTS = {'input': '', 'weight': '', 'q': '.qk', 'k': '.qk', 'softmax': '.softmax_v', 'v': '.softmax_v'}
# bytes of a channel's scale and zero point
CHANNEL_BYTES = 5


@dataclass(frozen=True)
class Factor:
    """A quantized factor of a product.

    Attributes:
        path: of its quantizer.
        role: of its quantizer.
        kind: 'weight' or 'act'.
        bits: what the recipe gives it.
        numel: values of a weight, or of an activation per image.
        channels: of a weight, that have a scale of their own; 0 for an activation.
    """

    path: str
    role: str
    kind: str
    bits: int
    numel: int
    channels: int = 0

    def packed_bytes(self, bits: int) -> int:
        """Bytes of a weight in the packed checkpoint; 0 for an activation."""
        return -(-self.numel * bits // 8) + CHANNEL_BYTES * self.channels if self.kind == 'weight' else 0


@dataclass(frozen=True)
class Product:
    """One product with one or two quantized factors.

    Attributes:
        path: of the operator, or of the attention with the kind of the product, as in `ptqsam.hardware`.
        factors: those that are quantized, in module order.
        macs: multiplications per image.
    """

    path: str
    factors: tuple[Factor, ...]
    macs: int

    def bit_operations(self, bits: Sequence[int]) -> int:
        """Multiplications times the bits of both factors.

        Args:
            bits: of the quantized factors.
        """
        left, right = (*bits, FLOAT_BITS)[:2]
        return self.macs * left * right


def product_path(path: str) -> str:
    """Path of the product that a quantizer's tensor is a factor of."""
    parent, _, name = path.rpartition('.')
    return parent + PRODUCTS[name]


def count_products(model: Any, choices: Sequence[Choice], boxes: int) -> list[Product]:
    """Products of a model, counted on the meta device, where nothing is computed.

    Args:
        model: detector-prompted SAM on the meta device, with quant modules that are off.
        choices: quantizers that the rules put in.
        boxes: prompt boxes on an image.
    """
    sam, numel = model.sam, Counter[str]()

    def count(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        numel[str(quantizer.path)] += args[0].numel()

    handles = [quantizer.register_forward_pre_hook(count) for quantizer in act_quantizers(sam)]
    meter = Meter(sam, {}, budget=1)
    # without gradients TinyViT fuses its attention, and its softmax outputs would not be seen
    with torch.device('meta'), torch.enable_grad():
        embedding = model.encode(torch.empty(1, 3, sam.image_size, sam.image_size))
        model.decode_logits(embedding, torch.empty(boxes, 4))
    meter.remove()
    for handle in handles:
        handle.remove()
    return list_products(sam, choices, numel, {product.path: product.macs for product in meter.products})


def list_products(
    sam: nn.Module, choices: Sequence[Choice], numel: Mapping[str, int], macs: Mapping[str, int]
) -> list[Product]:
    """Products of a SAM that have quantized factors, in module order.

    Args:
        sam: with quant modules; may lie on the meta device.
        choices: quantizers that the rules put in.
        numel: path of an activation's quantizer -> values per image.
        macs: path of a product -> multiplications per image; 0 where there is none, as in a normalisation.
    """
    weights = {quantizer.path: (op.weight, op.weight_ch_axis) for _, op, quantizer in quant_ops(sam)}
    groups: dict[str, list[Factor]] = {}
    for choice in choices:
        point = choice.point
        values, channels = numel.get(point.path, 0), 0
        if point.kind == 'weight':
            weight, axis = weights[point.path]
            values, channels = weight.numel(), weight.shape[axis]
        factor = Factor(point.path, point.role, point.kind, choice.bits, values, channels)
        groups.setdefault(product_path(point.path), []).append(factor)
    return [Product(path, tuple(factors), macs.get(path, 0)) for path, factors in groups.items()]
