"""What the search of weight ranges costs, counted in elements and not in seconds, against the exhaustive grid."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptqsam.functional import fake_quantize, lp_error, quant_range
from ptqsam.observers import MSE

# these look at single places of a large tensor
LOOKUPS = (torch.ops.aten.gather, torch.ops.aten.index, torch.ops.aten.searchsorted)
# these touch nothing yet
ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)
# these pass over their elements several times
LOGARITHMIC = (torch.ops.aten.sort, torch.ops.aten.searchsorted)


class ElementCount(TorchDispatchMode):
    """Adds up the elements that every operation reads or writes, whichever are more; a view touches none."""

    def __init__(self) -> None:
        super().__init__()
        self.touched = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in ALLOCATIONS:
            looked_up = function.overloadpacket in LOOKUPS
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            work = max((tensor.numel() for tensor in written + (not looked_up) * read), default=0)
            if function.overloadpacket in LOGARITHMIC:
                work *= math.log2(read[0].shape[-1] + 1)
            self.touched += work
        return out


def exhaustive(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Smallest error per row over 100 widths x all zero points, each by quantizing every value."""
    qmin, qmax = quant_range(bits, False)
    span = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    best = torch.full_like(span, torch.inf, dtype=torch.float64)
    for step in range(1, 101):
        scale = span * (step / 100) / (qmax - qmin)
        for zero in range(qmin, qmax + 1):
            zeros = torch.full_like(scale, zero, dtype=torch.int32)
            best = torch.minimum(best, lp_error(weight, fake_quantize(weight, scale, zeros, qmin, qmax, 0), ch_axis=0))
    return best


@pytest.mark.parametrize(('bits', 'columns'), [(4, 3072), (5, 768)])
def test_a_tenth_of_the_exhaustive_grid_at_equal_error(bits, columns):
    # the grid doubles with every bit, the search hardly grows; its tables weigh more in short rows
    torch.manual_seed(0)
    # like weights of SAM-B: rows of different sizes, some of them with single large values
    weight = torch.randn(48, columns) * torch.rand(48, 1).add(0.5)
    weight[::8] *= 1 + 3 * (torch.rand(6, columns) < 0.005)
    with ElementCount() as full:
        best = exhaustive(weight, bits)
    with ElementCount() as ours:
        observer = MSE(bits, ch_axis=0)
        observer.update(weight)
        scale, zero_point = observer.qparams()
    error = lp_error(weight, fake_quantize(weight, scale, zero_point, *quant_range(bits, False), 0), ch_axis=0)
    assert ours.touched <= 0.1 * full.touched
    assert (error <= (1 + 1e-6) * best).all()
