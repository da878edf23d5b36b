"""Error that each quantizer adds to the tensor it quantizes: SQNR and cosine similarity."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptqsam.modules.walk import act_quantizers
from ptqsam.progress import progress
from ptqsam.quantizers import Quantizer


@dataclass(frozen=True)
class QuantizationError:
    """Error of one quantizer.

    Attributes:
        sqnr: signal to quantization noise ratio in dB, 10 log10(sum x^2 / sum (x_hat - x)^2).
        cosine: cosine similarity of x and x_hat.
    """

    sqnr: float
    cosine: float

    def plain(self) -> dict[str, float | None]:
        """Values for a JSON file, which knows no infinity: an exact result has SQNR None."""
        return dict(sqnr=None if math.isinf(self.sqnr) else self.sqnr, cosine=self.cosine)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> 'QuantizationError':
        """Inverse of `plain`."""
        return cls(math.inf if values['sqnr'] is None else values['sqnr'], values['cosine'])


def error_sums(x: Tensor, x_hat: Tensor) -> Tensor:
    """Sums from which SQNR and cosine follow, float64 (4,): x^2, (x_hat - x)^2, x_hat^2, x * x_hat."""
    x, x_hat = x.detach().float(), x_hat.detach().float()
    sums = [x.square().sum(), (x_hat - x).square().sum(), x_hat.square().sum(), (x * x_hat).sum()]
    return torch.stack(sums).double()


def error_from_sums(sums: Tensor) -> QuantizationError:
    """SQNR and cosine from the sums of `error_sums`; an exact result has infinite SQNR."""
    signal, noise, quantized, product = sums.tolist()
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)
    norm = (signal * quantized) ** 0.5
    return QuantizationError(sqnr, product / norm if norm > 0 else float(signal == quantized))


@torch.no_grad()
def measure_quantization_error(model: Any, target: nn.Module, batches: Iterable[Any]) -> dict[str, QuantizationError]:
    """Error of every activation quantizer in the quantized model.

    Args:
        model: detector-prompted SAM with `test_step`.
        target: its frozen quantized part.
        batches: a few data batches; activations are those of the quantized model.

    Returns:
        Quantizer path -> error; quantizers that saw no data are left out.
    """
    sums: dict[str, Tensor] = {}

    def record(quantizer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(quantizer, Quantizer)
        total = error_sums(args[0], quantizer.decode(quantizer.encode(args[0])))
        sums[quantizer.path] = sums[quantizer.path] + total if quantizer.path in sums else total

    handles = [q.register_forward_pre_hook(record, with_kwargs=True) for q in act_quantizers(target)]
    try:
        for batch in progress(batches, 'quantization error', 'image'):
            model.test_step(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: error_from_sums(total) for path, total in sums.items()}
