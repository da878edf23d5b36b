"""Switch the quantizers of a frozen model one by one, those of weights too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ptqsam.modules import QuantOp
from ptqsam.modules.walk import act_quantizers, quant_ops


class Switches:
    """All quantizers of a model, by path.

    A weight is quantized once: its switch puts the quantized or the float one into the operator.

    Args:
        target: frozen SAM; its operators hold quantized weights.
        float_weights: name of a quantized operator -> its weight in the float model.
    """

    def __init__(self, target: nn.Module, float_weights: Mapping[str, Tensor]) -> None:
        self.activations = {quantizer.path: quantizer for quantizer in act_quantizers(target)}
        self.ops: dict[str, QuantOp] = {}
        # path -> float and quantized weight
        self.weights: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, op, quantizer in quant_ops(target):
            self.ops[quantizer.path] = op
            plain = nn.Parameter(float_weights[name].detach().to(op.weight), requires_grad=False)
            self.weights[quantizer.path] = (plain, op.weight)

    def turn(self, path: str, on: bool) -> None:
        """Switch a quantizer on or off."""
        if path in self.weights:
            self.ops[path].weight = self.weights[path][on]
        else:
            self.activations[path].mode = 'quantize' if on else 'off'

    def turn_all(self, on: bool) -> None:
        """Switch all quantizers on or off."""
        for path in (*self.activations, *self.weights):
            self.turn(path, on)

    @contextmanager
    def turned(self, path: str, on: bool) -> Iterator[None]:
        """Switch a quantizer, and back afterwards; it must be in the other position."""
        self.turn(path, on)
        try:
            yield
        finally:
            self.turn(path, not on)
