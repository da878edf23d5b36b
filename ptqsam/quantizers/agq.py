"""Logarithmic quantizer of softmax outputs (AGQ of PTQ4SAM, Lv et al., CVPR 2024; methods.md 3.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from ptqsam.errors import ConfigError, GateError
from ptqsam.functional import drop_mask
from ptqsam.log_functional import LearnedLogScale, LogGrid, log_dequantize, log_fake_quantize, log_quantize
from ptqsam.observers.product import ProductSearch
from ptqsam.quantizers.base import Quantizer
from ptqsam.registry import QUANTIZERS


@QUANTIZERS.register_module()
class AGQ(Quantizer):
    """Levels ``scale * 2^(-code / tau)`` and 0, with tau of 1, 2 or 4 codes per octave.

    Scale and tau come from a search for the product that the values go into (`ProductSearch`), whatever the recipe
    says about observers. Values above the scale become the scale; small ones, zero and below become 0, or where there
    are codes for it the level at 1e-20, the floor of the released code. Deviations from that code: 0 takes the last of
    the 2^bits codes (there it comes on top); the scale is learned as its logarithm, so it stays positive whatever the
    optimiser does, and a step is relative to it; the search scans and refines (there, bounded minimisation, which gets
    trapped).

    Args:
        bits: bit width, 2 to 8.
        ch_axis: must be None. Default None.
        observer: ignored. Default None.
        seed: seed of the draws of the search. Default 0.

    Raises:
        ConfigError: bits outside 2..8, or a channel axis.

    Attributes:
        log_scale: natural logarithm of the scale; a parameter.
        tau: buffer, int32.
        published: 0 comes on top of the 2^bits codes, as in the released code; set by the compat code. Default False.
    """

    log_domain = True
    own_observer = 'ProductSearch'
    observer: ProductSearch
    tau: Tensor

    def __init__(
        self, bits: int, ch_axis: int | None = None, observer: dict[str, Any] | None = None, seed: int = 0
    ) -> None:
        if ch_axis is not None:
            raise ConfigError(f'AGQ: ch_axis is {ch_axis!r}, but there is one scale only, for softmax outputs')
        super().__init__(bits)
        self.observer = ProductSearch(bits, seed=seed)
        self.published = False
        # tau on the host: the arithmetic branches on it, and reading the buffer would wait for a GPU
        self._tau = 1

    def make_parameters(self) -> None:
        """Create the parameters without elements."""
        self.log_scale = nn.Parameter(torch.empty(0))
        self.register_buffer('zero_point', torch.empty(0, dtype=torch.int32))
        self.register_buffer('tau', torch.empty(0, dtype=torch.int32))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Largest level, positive."""
        return self.log_scale.detach().exp()

    @property
    def calibrated(self) -> bool:
        """Whether there are quantization parameters."""
        return self.log_scale.numel() > 0

    @property
    def zero_code(self) -> int:
        """The code whose value is 0."""
        return self.qmax + self.published

    def grid(self) -> LogGrid:
        """The levels as the arithmetic wants them.

        Raises:
            GateError: there are no parameters yet.
        """
        if not self.calibrated:
            raise GateError(f'{self.name}: has no scale yet; observe data first, or load a state')
        return LogGrid(self.scale, self._tau, self.zero_code)

    def observe(self, x: Tensor, operand: Tensor | None) -> None:
        """Search scale and tau of this map; with the operand, for the product."""
        self.observer.zero = self.zero_code
        self.observer.update_product(x, operand)

    @torch.no_grad()
    def calibrate(self) -> None:
        """Take over what the search found.

        Raises:
            GateError: nothing was observed, or NaN or infinity.
        """
        try:
            _, scale = self.observer.bounds()
        except GateError as error:
            raise GateError(f'{self.name}: {error}') from None
        self.set_parameters(scale, self.observer.tau())

    def set_parameters(self, scale: Tensor, tau: int) -> None:
        """Set the parameters.

        Args:
            scale: positive, 0-dim.
            tau: 1, 2 or 4.
        """
        # .data keeps the identity of a parameter that an optimiser may hold
        self.log_scale.data = scale.detach().float().log()
        self.zero_point.data = torch.zeros_like(scale, dtype=torch.int32)
        self.tau.data = torch.full_like(self.zero_point, tau)
        self._tau, self._outdated = tau, False

    def reset(self) -> None:
        """Forget parameters and statistics, and switch off."""
        self.log_scale.data = self.log_scale.new_empty(0)
        self.tau.data = self.tau.new_empty(0)
        super().reset()

    def drop(self, x: Tensor) -> Tensor:
        """Quantize each value with probability `drop_prob`, in one operation that keeps no mask for the gradient."""
        return self._learned(x, drop_mask(x, self.drop_prob))

    def fake_quantize(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Quantized values; straight-through gradient of the rounding for `x` and the scale."""
        if torch.is_grad_enabled() and (x.requires_grad or self.log_scale.requires_grad):
            return self._learned(x, None)
        return log_fake_quantize(x, self.grid(), inplace)

    def _learned(self, x: Tensor, mask: Tensor | None) -> Tensor:
        grid = self.grid()
        return LearnedLogScale.apply(x, self.log_scale, grid.tau, grid.zero, mask)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of `x`, int32; the larger the value, the smaller its code."""
        return log_quantize(x, self.grid())

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes, float32."""
        return log_dequantize(codes, self.grid())

    def levels(self) -> Tensor:
        """All values, ascending: (2^bits,)."""
        grid = self.grid()
        codes = torch.arange(grid.zero, -1, -1, dtype=torch.int32, device=grid.scale.device)
        return log_dequantize(codes, grid)

    def learnable(self) -> dict[str, nn.Parameter]:
        """The logarithm of the scale."""
        return {'log_scale': self.log_scale}

    def extra_repr(self) -> str:
        """Settings, for printing a model."""
        return f'bits={self.bits}, tau={self._tau if self.calibrated else None}, mode={self.mode}'

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over tau on the host as well."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        stored = state_dict.get(f'{prefix}tau')
        if isinstance(stored, Tensor) and stored.numel() == 1:
            self._tau = int(stored)
