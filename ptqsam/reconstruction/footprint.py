"""What a reconstruction costs, from shapes alone: room for activations, work and memory of an iteration."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptqsam.config import Reconstruction
from ptqsam.estimate import Work, measure_work
from ptqsam.modules.unit_kinds import Level
from ptqsam.reconstruction.cache import entry_bytes
from ptqsam.reconstruction.sampling import batch_share, draw_positions
from ptqsam.reconstruction.streams import Arguments, captured
from ptqsam.reconstruction.units import Segment, Unit, find_segments

# What an iteration adds to the forward and backward pass of the float unit: no matrix products, but as many bytes again
# for quantizing, dropping and comparing, and the memory that this takes. Against CPU time on one thread, MobileSAM at
# W4A4 with 1024 positions: all units together 1.09 s for 1.02 s, attentions and MLPs 0.7 to 1.5 times their time,
# depthwise convolutions up to 3.6 times, of whose backward pass too many operations are counted.
ADDED_TRAFFIC, ADDED_MEMORY = 1.0, 0.6
# times that the soft rounding, its regulariser and Adam read or write each weight
WEIGHT_PASSES = 40


@dataclass(frozen=True)
class Step:
    """Cost of one iteration of a unit.

    Attributes:
        unit: its name.
        work: forward and backward pass of the float unit on the positions of an iteration.
        weights: number of its weights.
    """

    unit: str
    work: Work
    weights: int

    @property
    def total(self) -> Work:
        """With everything that reconstruction adds."""
        traffic = self.work.traffic * (1 + ADDED_TRAFFIC) + WEIGHT_PASSES * 4 * self.weights
        return Work(self.work.flops, round(traffic), round(self.work.peak * (1 + ADDED_MEMORY)))


def cache_bytes(model: Any, target: nn.Module, level: Level, samples: Sequence[Any], dtype: str = 'float32') -> int:
    """Largest size of all activation caches together, over the course of a reconstruction.

    Args:
        model: detector-prompted SAM with `encode` and `decode_logits`, on any device, the meta device too.
        target: the SAM in it, with quant modules.
        level: unit level.
        samples: calibration images with `image` and `boxes`; the one with most boxes stands for all.
        dtype: of the stored values.
    """
    sizes = []
    for segments, forward in _parts(model, target, level, samples):
        sizes += _segment_bytes(segments, forward, getattr(torch, dtype))
    return len(samples) * max(sizes, default=0)


def iteration_steps(model: Any, target: nn.Module, settings: Reconstruction, samples: Sequence[Any]) -> list[Step]:
    """Cost of an iteration of every unit, in the order of execution.

    Args:
        model: detector-prompted SAM on the meta device.
        target: the SAM in it, with quant modules, all quantizers `off`.
        settings: of the reconstruction.
        samples: calibration images with `image` and `boxes`; the one with most boxes stands for all.
    """
    steps = []
    for segments, forward in _parts(model, target, settings.unit, samples):
        units = [unit for segment in segments for unit in segment.units]
        with ExitStack() as stack:
            calls = {unit: stack.enter_context(captured(unit.first)) for unit in units}
            forward()
        for unit in units:
            work = _step_work(unit, Arguments.of(calls[unit][0]), settings, len(samples))
            steps.append(Step(unit.name, work, sum(op.weight.numel() for op in unit.ops.values())))
    return steps


def _parts(model: Any, target: nn.Module, level: Level, samples: Sequence[Any]) -> Iterator[tuple[list[Segment], Any]]:
    """Segments of the encoder and of the decoder, and how each is run."""
    sample = max(samples, key=lambda sample: len(sample.boxes))
    embeddings: list[Tensor] = []
    forwards = [
        lambda: embeddings.append(model.encode(sample.image)),
        lambda: model.decode_logits(embeddings[0], sample.boxes),
    ]
    without_gradients = [torch.no_grad()(forward) for forward in forwards]
    yield from zip(find_segments(target, level, without_gradients), without_gradients, strict=True)


def _segment_bytes(segments: Sequence[Segment], forward: Any, dtype: torch.dtype) -> list[int]:
    """Bytes that all caches take per image while each segment is the current one.

    Args:
        segments: of one part of the model, in the order of execution.
        forward: runs that part, for one image.
        dtype: of the stored values.
    """
    own: dict[Any, int] = {}
    made: dict[Any, int] = {}
    handles = []
    for thing in [thing for segment in segments for thing in (segment, *segment.units)]:
        # sizes, not tensors: those of a whole encoder would not fit

        def note_input(_: nn.Module, args: Any, kwargs: Any, thing: Unit = thing) -> None:
            own[thing] = entry_bytes(_tensors((args, kwargs)), dtype)

        def note_output(_: nn.Module, args: Any, output: Any, thing: Unit = thing) -> None:
            made[thing] = entry_bytes(_tensors(output), dtype)

        handles.append(thing.first.register_forward_pre_hook(note_input, with_kwargs=True))
        handles.append(thing.last.register_forward_hook(note_output))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    sizes = []
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        units = sum(own[unit] + made[unit] for unit in segment.units)
        largest = max((own[unit] for unit in segment.units), default=0)
        ahead = own[following] if following is not None else 0
        # both streams stand before the segment, the float one behind it as well
        sizes.append(2 * own[segment] + 2 * ahead + units + largest)
    return sizes


def _step_work(unit: Unit, arguments: Arguments, settings: Reconstruction, images: int) -> Work:
    """Forward and backward pass of a float unit on the positions of an iteration; meta tensors only."""
    size, share = batch_share(settings, images)
    draw = draw_positions(unit, [x.shape for x in arguments.tensors], share, np.random.default_rng(0))
    inputs = [torch.cat([x] * size) for x in draw.inputs(tuple(arguments.tensors))]

    def step() -> None:
        args, kwargs = Arguments.restore(inputs, arguments.layout)
        outputs = tree_leaves(unit(*args, **kwargs, **draw.arguments))
        losses = [(x - torch.empty(x.shape)).square().mean() for x in outputs]
        torch.stack(losses).sum().backward()

    with _learnable(unit) as weights:
        work = measure_work(step, gradients=True)
        for weight in weights:
            weight.grad = None
    return work


@contextmanager
def _learnable(unit: Unit) -> Iterator[list[nn.Parameter]]:
    """Let the weights of a unit have gradients."""
    weights = [op.weight for op in unit.ops.values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
