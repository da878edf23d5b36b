"""Forward passes that start in the middle: what precedes the quantizer in question is computed once per image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ptqsam.modules.watch import result_of
from ptqsam.reconstruction.streams import Stream, placeholder
from ptqsam.reconstruction.units import Segment


class Prefix:
    """A part of the model on one image, run from a segment on; equal to a run from its input, bit for bit.

    Stands at the first segment, where a run is a run from the input. `advance` computes the current segment and goes
    to the next one. Outputs of segments before the last are replaced by NaN: if something after depends on them after
    all, as mask tokens do if a recipe quantizes hypernetworks, runs start from the input again.

    Args:
        forward: runs the part, the image encoder or the mask decoder.
        segments: chain of the part, in the order of execution (`find_segments`).
    """

    def __init__(self, forward: Callable[[], Any], segments: Sequence[Segment]) -> None:
        self.forward = forward
        self.segments = segments
        self.placeholders: list[Any] = []
        self.last: Any = None

    @torch.no_grad()
    def run(self) -> Any:
        """What the part returns, with the quantizers as they are now; those before the segment do not count."""
        result = self._run_from_here()
        if self.last is not None and any(bool(leaf.isnan().any()) for leaf in tree_leaves(result)):
            self.segments, self.placeholders, self.last = (), [], None
            result = self.forward()
        return result

    @torch.no_grad()
    def advance(self) -> None:
        """Go to the next segment; stays at the input where there is no chain."""
        if not self.segments:
            return
        position = len(self.placeholders) + (self.last is not None)
        output = result_of(self.segments[position].last, self._run_from_here)
        if self.last is not None:
            self.placeholders.append(tree_map(placeholder, self.last))
        self.last = output

    def _run_from_here(self) -> Any:
        if self.last is None:
            return self.forward()
        stream = Stream.standing(self.segments, len(self.placeholders), self.placeholders)
        with stream.known(0, self.last):
            return self.forward()


def place(path: str, segments: Sequence[Segment]) -> int:
    """Index of the segment that a quantizer is in; 0 for what is in none, since it may be anywhere.

    Args:
        path: of the quantizer.
        segments: chain of its part of the model.
    """
    for index, segment in enumerate(segments):
        if any(path.startswith(f'{name}.') for name in segment.modules):
            return index
    return 0
