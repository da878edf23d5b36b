"""Show what reaches the activation quantizers of the float model; how much it is, and what is multiplied with it."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqsam.analysis.sensitivity import Subject
from ptqsam.hardware import Meter
from ptqsam.progress import progress
from ptqsam.quantizers import Quantizer
from ptqsam.reconstruction.engine import Sample

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Size:
    """What a quantizer handles.

    Attributes:
        numel: values of the weight, or of the activation per image.
        macs: multiplications per image of the products that it is a factor of.
    """

    numel: int
    macs: int


@contextmanager
def shown(quantizers: Mapping[str, Quantizer], see: See) -> Iterator[None]:
    """Let activation quantizers show what they are given, in place of quantizing it; afterwards they are off.

    Attention forms its maps only for a quantizer that is not off, so a hook on one that is would miss them.

    Args:
        quantizers: path -> calibrated quantizer.
        see: gets path and tensor; may not change it.
    """

    def shower(path: str) -> Callable[[Tensor, Tensor | None], None]:
        return lambda x, _operand: see(path, x)

    try:
        for path, quantizer in quantizers.items():
            # an instance attribute hides the method, and deleting it brings the method back
            vars(quantizer)['observe'] = shower(path)
            quantizer.mode = 'observe'
        yield
    finally:
        for quantizer in quantizers.values():
            vars(quantizer).pop('observe', None)
            # what was shown must not count as observed: parameters that were loaded stay
            quantizer.load_state_dict(quantizer.state_dict())
            quantizer.mode = 'off'


@torch.no_grad()
def show_images(subject: Subject, samples: Sequence[Sample], see: See, what: str) -> None:
    """Show all activations of the float model on images.

    Args:
        subject: the model.
        samples: images and boxes.
        see: gets path and tensor, image after image.
        what: the work, for the progress bar.
    """
    subject.switches.turn_all(on=False)
    with shown(subject.switches.activations, see):
        for sample in progress(samples, what, 'image'):
            subject.model.decode_logits(subject.model.encode(sample.image), sample.boxes)


def measure_sizes(subject: Subject, samples: Sequence[Sample]) -> dict[str, Size]:
    """What each quantizer handles, by path.

    Args:
        subject: the model.
        samples: images and boxes; counts are means over them.
    """
    numel, macs = Counter[str](), Counter[str]()

    def count(path: str, x: Tensor) -> None:
        numel[path] += x.numel()

    meter = Meter(subject.model.sam, {}, budget=1)
    try:
        show_images(subject, samples, count, 'count values')
    finally:
        meter.remove()
    for product in meter.products:
        for factor in (product.left, product.right):
            if factor is not None:
                macs[factor.path] += product.macs
    images = len(samples)
    sizes = {path: Size(round(numel[path] / images), round(macs[path] / images)) for path in numel}
    for path, op in subject.switches.ops.items():
        sizes[path] = Size(op.weight.numel(), round(macs[path] / images))
    return sizes
