"""What a reconstruction costs, from shapes alone: room for activations, work and memory of an iteration."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptqsam.config import PartName, Reconstruction
from ptqsam.estimate import Work, measure_work
from ptqsam.modules.watch import captured, returned
from ptqsam.reconstruction.cache import entry_bytes
from ptqsam.reconstruction.losses import follows_prompts
from ptqsam.reconstruction.prompts import PromptPath, two_way_transformer
from ptqsam.reconstruction.sampling import Draw, batch_share, draw_positions
from ptqsam.reconstruction.streams import Arguments, Stream
from ptqsam.reconstruction.units import Segment, Unit, find_parts

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
        iters: iterations.
        part: of SAM.
        path: what forward and backward pass from the unit to its prompted tokens add; None: it is not followed.
    """

    unit: str
    work: Work
    weights: int
    iters: int
    part: PartName
    path: Work | None = None

    @property
    def total(self) -> Work:
        """With everything that reconstruction adds."""
        traffic = self.work.traffic * (1 + ADDED_TRAFFIC) + WEIGHT_PASSES * 4 * self.weights
        path = self.path or Work(0, 0, 0)
        peak = self.work.peak * (1 + ADDED_MEMORY) + path.peak
        return Work(self.work.flops + path.flops, round(traffic) + path.traffic, round(peak))


@dataclass(frozen=True)
class _PartOfSAM:
    """A chain of segments, and how it is run on the image that stands for all.

    Attributes:
        name: which part.
        segments: in the order of execution.
        forward: runs that part, without gradients.
        follow: runs the model to its masks, with gradients, as `PromptPath` wants it.
    """

    name: PartName
    segments: list[Segment]
    forward: Callable[[], Any]
    follow: Callable[[int, Draw], Any]


def cache_bytes(model: Any, target: nn.Module, settings: Reconstruction, samples: Sequence[Any]) -> int:
    """Largest size of all activation caches together, over the course of a reconstruction.

    Args:
        model: detector-prompted SAM with `encode` and `decode_logits`, on any device, the meta device too.
        target: the SAM in it, with quant modules.
        settings: of the reconstruction.
        samples: calibration images with `image` and `boxes`; the one with most boxes stands for all.
    """
    dtype = getattr(torch, settings.cache.dtype)
    parts = list(_parts(model, target, settings, samples))
    followed = any(
        unit.followed_to is not None for part in parts for segment in part.segments for unit in segment.units
    )
    # of what leaves the two-way transformer
    token_bytes: list[int] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        token_bytes.extend(entry_bytes([tokens], dtype) for tokens in output)

    handle = two_way_transformer(target).register_forward_hook(note) if followed else None
    try:
        notes = [_note_sizes(part.segments, part.forward, dtype) for part in parts]
    finally:
        if handle is not None:
            handle.remove()
    sizes: list[int] = []
    for part, (own, made) in zip(parts, notes, strict=True):
        streams = 1 if settings.drift_correction and part.name == 'encoder' else 2
        sizes += _segment_bytes(part.segments, own, made, token_bytes, streams)
    # a prompt-aware reconstruction leaves out images without boxes
    images = sum(len(sample.boxes) > 0 for sample in samples) if follows_prompts(settings) else len(samples)
    return images * max(sizes, default=0)


def iteration_steps(model: Any, target: nn.Module, settings: Reconstruction, samples: Sequence[Any]) -> list[Step]:
    """Cost of an iteration of every unit, in the order of execution.

    Args:
        model: detector-prompted SAM on the meta device.
        target: the SAM in it, with quant modules, all quantizers `off`.
        settings: of the reconstruction.
        samples: calibration images with `image` and `boxes`; the one with most boxes stands for all.
    """
    steps = []
    for part in _parts(model, target, settings, samples):
        units = {unit: place for place, segment in enumerate(part.segments) for unit in segment.units}
        with ExitStack() as stack:
            calls = {unit: stack.enter_context(captured(unit.first)) for unit in units}
            outputs = [stack.enter_context(returned(segment.last)) for segment in part.segments]
            part.forward()
        own = settings.of(part.name)
        for unit, place in units.items():
            arguments, path, added = Arguments.of(calls[unit][0]), None, None
            work = _step_work(unit, arguments, own, len(samples), None)
            if unit.followed_to is not None:
                standing = Stream.standing(part.segments, place, [found[0] for found in outputs])
                path = PromptPath(target, standing, part.follow, unit)
                whole = _step_work(unit, arguments, own, len(samples), path)
                added = Work(whole.flops - work.flops, whole.traffic - work.traffic, whole.peak - work.peak)
            weights = sum(op.weight.numel() for op in unit.ops.values())
            steps.append(Step(unit.name, work, weights, own.iters, part.name, added))
    return steps


def _parts(model: Any, target: nn.Module, settings: Reconstruction, samples: Sequence[Any]) -> Iterator[_PartOfSAM]:
    """Encoder and decoder."""
    sample = max(samples, key=lambda sample: len(sample.boxes))
    embeddings: list[Tensor] = []

    def follow_encoder(index: int, draw: Draw) -> Any:
        return model.decode_logits(model.encode(sample.image), sample.boxes)

    def follow_decoder(index: int, draw: Draw) -> Any:
        return model.decode_logits(embeddings[0], *draw.inputs((sample.boxes,)))

    forwards = [
        torch.no_grad()(lambda: embeddings.append(model.encode(sample.image))),
        torch.no_grad()(lambda: model.decode_logits(embeddings[0], sample.boxes)),
    ]
    found = find_parts(target, settings, forwards)
    for (name, segments), forward, follow in zip(
        found.items(), forwards, (follow_encoder, follow_decoder), strict=True
    ):
        yield _PartOfSAM(name, segments, forward, follow)


def _note_sizes(
    segments: Sequence[Segment], forward: Callable[[], Any], dtype: torch.dtype
) -> tuple[dict[Unit, int], dict[Unit, int]]:
    """Bytes of the inputs and of the outputs of segments and units for one image.

    Args:
        segments: of one part of the model.
        forward: runs that part.
        dtype: of the stored values.
    """
    own: dict[Unit, int] = {}
    made: dict[Unit, int] = {}

    # sizes, not tensors: those of a whole encoder would not fit
    def note_input(thing: Unit, _: nn.Module, args: Any, kwargs: Any) -> None:
        own[thing] = entry_bytes(_tensors((args, kwargs)), dtype)

    def note_output(thing: Unit, _: nn.Module, args: Any, output: Any) -> None:
        made[thing] = entry_bytes(_tensors(output), dtype)

    handles = []
    for thing in [thing for segment in segments for thing in (segment, *segment.units)]:
        handles.append(thing.first.register_forward_pre_hook(partial(note_input, thing), with_kwargs=True))
        handles.append(thing.last.register_forward_hook(partial(note_output, thing)))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return own, made


def _segment_bytes(
    segments: Sequence[Segment], own: dict[Unit, int], made: dict[Unit, int], token_bytes: Sequence[int], streams: int
) -> Iterator[int]:
    """Bytes that all caches take per image while each segment is the current one.

    Args:
        segments: of one part of the model, in the order of execution.
        own: bytes of inputs.
        made: bytes of outputs.
        token_bytes: of what leaves the two-way transformer, which units that are followed to it have among targets.
        streams: 2, or 1 where the float model has none of its own.
    """
    for segment, following in zip_longest(segments, segments[1:]):
        tokens = sum(token_bytes[unit.followed_to] for unit in segment.units if unit.followed_to is not None)
        units = sum(own[unit] + made[unit] for unit in segment.units) + tokens
        largest = max((own[unit] for unit in segment.units), default=0)
        ahead = own[following] if following is not None else 0
        # the streams stand before the segment, the float one behind it as well
        yield streams * (own[segment] + ahead) + units + largest


def _step_work(
    unit: Unit, arguments: Arguments, settings: Reconstruction, images: int, path: PromptPath | None
) -> Work:
    """Forward and backward pass of a float unit, and of the path if there is one, on the positions of an iteration.

    Meta tensors only.
    """
    size, share = batch_share(settings, images)
    draw = draw_positions(unit, [x.shape for x in arguments.tensors], share, np.random.default_rng(0))
    inputs = [torch.cat([x] * size) for x in draw.inputs(tuple(arguments.tensors))]

    def step() -> None:
        args, kwargs = Arguments.restore(inputs, arguments.layout)
        outputs = tree_leaves(unit(*args, **kwargs, **draw.arguments))
        if path is not None:
            per_image = zip(*(output.chunk(size) for output in outputs), strict=True)
            outputs = [*outputs, *(path(0, own, draw) for own in per_image)]
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
