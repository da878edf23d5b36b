"""Stage `freeze`: put every weight on its integer grid, then the gate: prove that the model is really quantized.

The released code of this field evaluated models with soft weights and half-float activations (methods.md section 2,
D1 and D2). The gate looks at the model as it will be evaluated and stops the run when anything is left.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ptqsam.errors import GateError
from ptqsam.evaluation.quantization_error import QuantizationError, error_from_sums, error_sums
from ptqsam.modules import QuantOp
from ptqsam.quantizers import Quantizer
from ptqsam.solver.prepare import quant_ops, quantizers
from ptqsam.solver.rules import Choice


def freeze(model: nn.Module) -> dict[str, QuantizationError]:
    """Replace every quantized weight by its quantized values.

    Args:
        model: calibrated SAM, changed in place.

    Returns:
        Path of the weight quantizer -> error of the weight.
    """
    errors = {}
    for _, op, quantizer in quant_ops(model):
        before = op.weight
        op.freeze()
        errors[quantizer.path] = error_from_sums(error_sums(before, op.weight))
    return errors


def check_gate(model: nn.Module, planned: list[Choice]) -> None:
    """Refuse a model that is not quantized as planned.

    Args:
        model: frozen SAM.
        planned: what the rules decided to quantize.

    Raises:
        GateError: with the number of violations and the first of them.
    """
    found = list(violations(model, planned))
    if found:
        count = f'{len(found)} violation{"s" * (len(found) > 1)}'
        raise GateError(f'freeze gate: {count}, the model is not evaluated; {found[0]}')


def violations(model: nn.Module, planned: list[Choice]) -> Iterator[str]:
    """All ways in which a model is not quantized as planned, one line each."""
    present = {q.path: q for q in quantizers(model)}
    for choice in planned:
        path = choice.point.path
        if path not in present:
            yield f'{path}: no quantizer, but {choice.rule} puts one there'
        elif present[path].bits != choice.bits:
            yield f'{path}: {present[path].bits} bits, but {choice.rule} says {choice.bits}'
    for quantizer in present.values():
        yield from _quantizer_violations(quantizer)
    for name, op, quantizer in quant_ops(model):
        yield from _weight_violations(name, op, quantizer)


def _quantizer_violations(quantizer: Quantizer) -> Iterator[str]:
    if quantizer.mode != 'quantize':
        yield f"{quantizer.path}: mode is '{quantizer.mode}', not 'quantize'"
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        yield f'{quantizer.path}: a scale is not finite and positive'
    if not bool(((zero_point >= quantizer.qmin) & (zero_point <= quantizer.qmax)).all()):
        yield f'{quantizer.path}: a zero point lies outside {quantizer.qmin}..{quantizer.qmax}'


def _weight_violations(name: str, op: QuantOp, quantizer: Quantizer) -> Iterator[str]:
    weight = op.weight.detach()
    if not op.frozen:
        yield f'{name}.weight: not frozen, computed anew on every forward'
    if not torch.equal(quantizer.decode(quantizer.encode(weight)), weight):
        yield f'{name}.weight: values off the integer grid (soft or changed weights)'
    elif (most := most_distinct(weight, quantizer.ch_axis)) > 2**quantizer.bits:
        yield f'{name}.weight: {most} distinct values in a channel, {quantizer.bits} bits allow {2**quantizer.bits}'


def most_distinct(x: Tensor, ch_axis: int | None) -> int:
    """Largest number of distinct values in any channel of a tensor."""
    rows = x.reshape(1, -1) if ch_axis is None else x.movedim(ch_axis, 0).flatten(1)
    ordered = rows.sort(dim=1).values
    return int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max()) + 1
