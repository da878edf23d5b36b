"""Rough estimates before a run: work and memory of a forward pass from its shapes alone, and the speed of this machine.

A forward pass runs on meta tensors, so that nothing is computed. Its time is estimated as

    floating-point operations / speed of a matrix product  +  bytes that operators touch / speed of a GELU

with both speeds measured on the device in use. The second term is what makes one formula serve a ViT, where matrix
products dominate, as well as TinyViT and the mask decoder, where they do not; other elementwise operations,
normalisations and softmax run at about the speed of a GELU. Against measured times on one CPU thread: MobileSAM
encoder 1.18 s for 1.19 s, decoder with 16 boxes 1.01 s for 1.14 s, ViT-B at 512 pixels 2.50 s for 2.40 s.
"""

import resource
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ptqsam.modules.walk import quant_ops, quantizers

# what a packed checkpoint holds beside its tensors: JSON per quantizer (path, type, bits, error), per tensor (offsets)
MANIFEST_BYTES = 260
HEADER_BYTES = 110


@dataclass(frozen=True)
class Work:
    """What a computation costs.

    Attributes:
        flops: floating-point operations of matrix products and convolutions.
        traffic: bytes that operators read and write.
        peak: bytes of all tensors made by it that exist at a time, at most.
    """

    flops: int
    traffic: int
    peak: int


class _Recorder(TorchDispatchMode):
    """Adds up the bytes that operators touch, and the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = self.live = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        used = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # an unsafe view is a view that the operator's schema does not admit to be one
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.traffic += sum(tensor.nbytes for tensor in made + used)
        old = {tensor.untyped_storage() for tensor in used}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage not in old and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage.nbytes())
        return result

    def _forget(self, size: int) -> None:
        self.live -= size


def measure_work(forward: Callable[[], Any], gradients: bool = False) -> Work:
    """Run a computation on meta tensors and add up what it would cost, but for what operators do inside.

    Args:
        forward: the computation; tensors that it makes without a device are made on the meta device.
        gradients: it also computes gradients.
    """
    counter, recorder = FlopCounterMode(display=False), _Recorder()
    with torch.set_grad_enabled(gradients), torch.device('meta'), counter, recorder:
        forward()
    return Work(counter.get_total_flops(), recorder.traffic, recorder.peak)


@dataclass(frozen=True)
class Machine:
    """Speed of a device.

    Attributes:
        flops: floating-point operations per second of a float32 matrix product.
        bandwidth: bytes per second that a float32 GELU reads and writes.
    """

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """Estimated time of a computation."""
        return work.flops / self.flops + work.traffic / self.bandwidth


def measure_machine(device: torch.device, seconds: float = 0.15) -> Machine:
    """Measure the speed of a device as it is now, other load included.

    Args:
        device: CPU or GPU.
        seconds: time for each of the two measurements.

    Returns:
        Its speed with the number of threads that torch is set to.
    """
    side = 1024 if device.type == 'cpu' else 4096
    a = torch.rand(side, side, device=device)
    x = torch.rand(8 * side, side, device=device)

    def time(statement: str, **tensors: Tensor) -> float:
        timer = Timer(statement, globals=dict(tensors, gelu=gelu), num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=seconds).median

    return Machine(2 * side**3 / time('a @ a', a=a), 2 * x.nbytes / time('gelu(x)', x=x))


def memory_in_use(device: torch.device) -> int:
    """Bytes that a run needs before it has a model: what this process took so far; nothing that counts on a GPU."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if device.type == 'cpu' else 0


def packed_bytes(model: nn.Module) -> int:
    """Estimated size of a model's packed checkpoint (ptqsam/checkpoint.py).

    Args:
        model: SAM with quant modules; may lie on the meta device.

    Returns:
        Bytes: weight codes, float32 scale and 8-bit zero point of every channel, everything else as it is.
    """
    ops = list(quant_ops(model))
    weights = {id(op.weight) for _, op, _ in ops}
    planned = list(quantizers(model))
    inside = {id(tensor) for quantizer in planned for tensor in quantizer.state_dict(keep_vars=True).values()}
    tensors = list(model.state_dict(keep_vars=True).values())
    size = sum(tensor.nbytes for tensor in tensors if id(tensor) not in weights | inside)
    for _, op, quantizer in ops:
        size += -(-op.weight.numel() * quantizer.bits // 8) + 5 * op.weight.shape[op.weight_ch_axis]
    return size + len(planned) * (5 + MANIFEST_BYTES) + len(tensors) * HEADER_BYTES
