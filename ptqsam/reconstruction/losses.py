"""How far the outputs of a quantized unit are from those of the float unit."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ptqsam.registry import RECON_LOSSES


@RECON_LOSSES.register_module()
class SquaredError:
    """Squared error, summed over channels and averaged over everything else. Methods.md 1.5 step 3.

    It has no state: one call per iteration takes all outputs of the unit. The released code counts its calls to know
    the iteration, and is called once per output (D4); and it sums over axis 1, which is channels only for
    (B, C, H, W) (D5).
    """

    def __call__(
        self,
        outputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        channel_axes: Sequence[int],
        valid: Tensor | None = None,
    ) -> Tensor:
        """Loss of one iteration.

        Args:
            outputs: of the quantized unit, any layout.
            targets: of the float unit, same shapes.
            channel_axes: channel axis of each output.
            valid: bool, shape of the only output without its channel axis: positions that count. Default all.

        Returns:
            0-dim, summed over outputs.

        Raises:
            ValueError: numbers of outputs, targets and axes differ, or `valid` comes with several outputs.
        """
        if valid is not None and len(outputs) != 1:
            raise ValueError(f'valid positions belong to a single output, but there are {len(outputs)}')
        terms = [_term(*pair, valid) for pair in zip(outputs, targets, channel_axes, strict=True)]
        return sum(terms[1:], start=terms[0])


def _term(output: Tensor, target: Tensor, axis: int, valid: Tensor | None) -> Tensor:
    """Squared error of one output."""
    output, target = output.float(), target.float()
    if valid is None:
        # the sum over one axis and the mean over the others, without a tensor in between
        return F.mse_loss(output, target, reduction='sum') * (output.shape[axis] / output.numel())
    error = F.mse_loss(output, target, reduction='none').sum(axis)
    # no boolean index: it would make the host wait for the number of positions
    return (error * valid).sum() / valid.sum().clamp(min=1)
