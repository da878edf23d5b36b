"""How much room the activations of a reconstruction take."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptqsam.modules.unit_kinds import Level
from ptqsam.reconstruction.cache import entry_bytes
from ptqsam.reconstruction.streams import captured, returned
from ptqsam.reconstruction.units import Segment, find_segments


def cache_bytes(model: Any, target: nn.Module, level: Level, samples: Sequence[Any]) -> int:
    """Largest size of all activation caches together, over the course of a reconstruction.

    Args:
        model: detector-prompted SAM with `encode` and `decode_logits`, on any device, the meta device too.
        target: the SAM in it, with quant modules.
        level: unit level.
        samples: calibration images with `image` and `boxes`; the one with most boxes stands for all.
    """
    sample = max(samples, key=lambda sample: len(sample.boxes))
    embeddings: list[Tensor] = []
    forwards = [
        lambda: embeddings.append(model.encode(sample.image)),
        lambda: model.decode_logits(embeddings[0], sample.boxes),
    ]
    with torch.no_grad():
        parts = find_segments(target, level, forwards)
        sizes = [size for part, forward in zip(parts, forwards, strict=True) for size in _segment_bytes(part, forward)]
    return len(samples) * max(sizes, default=0)


def _segment_bytes(segments: Sequence[Segment], forward: Any) -> list[int]:
    """Bytes per image while each segment is the current one."""
    with ExitStack() as stack:
        watched = {thing: thing for segment in segments for thing in (segment, *segment.units)}
        inputs = {thing: stack.enter_context(captured(thing.first)) for thing in watched}
        outputs = {thing: stack.enter_context(returned(thing.last)) for thing in watched}
        forward()
    own = {thing: entry_bytes(_tensors(inputs[thing][0])) for thing in watched}
    made = {thing: entry_bytes(_tensors(outputs[thing][0])) for thing in watched}
    sizes = []
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        units = sum(own[unit] + made[unit] for unit in segment.units)
        largest = max((own[unit] for unit in segment.units), default=0)
        ahead = own[following] if following is not None else 0
        # both streams stand before the segment, the float one behind it as well
        sizes.append(2 * own[segment] + 2 * ahead + units + largest)
    return sizes


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
