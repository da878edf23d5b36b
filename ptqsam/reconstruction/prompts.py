"""Prompt-aware reconstruction (PAR of SAQ-SAM): from a unit's output to what the prompts make of it. Methods.md 4.2."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ptqsam.modules.base import qualified_name
from ptqsam.modules.unit_kinds import QUERIES, TWO_WAY_TRANSFORMER, unit_kind
from ptqsam.modules.walk import original_weights
from ptqsam.modules.watch import result_of
from ptqsam.reconstruction.sampling import Draw
from ptqsam.reconstruction.streams import Stream
from ptqsam.reconstruction.units import Unit


class PromptPath:
    """The rest of the float model, from the current segment's output to tokens that have met the prompts.

    What follows the segment runs in floating point, with gradients, up to and including the two-way transformer. Layer
    skipping: later blocks of the encoder hand on what they get, so that a stage learns from prompts at the cost of
    the neck and the decoder; what changes the shape between stages (TinyViT's patch merging) runs. All this lasts for
    one call: inference never skips a layer.

    Args:
        target: SAM with quant modules; the quantizers of all that follows the segment are `off`.
        stream: stands at the segment.
        forward: image and draw -> runs the model from that image to masks, prompted with the boxes that were drawn.
        unit: all of the current segment; its `followed_to` says which output of the transformer is wanted.

    Source: SAQ-SAM (arXiv 2503.06515), section on prompt-aware reconstruction.
    """

    def __init__(self, target: nn.Module, stream: Stream, forward: Callable[[int, Draw], Any], unit: Unit) -> None:
        assert unit.followed_to is not None
        self.target = target
        self.stream = stream
        self.forward = forward
        self.output = unit.followed_to
        transformer: Any = two_way_transformer(target)
        # its last attention changes the queries only
        self.end = transformer if self.output == QUERIES else transformer.layers[-1]
        later = [module for segment in stream.segments[stream.position + 1 :] for module in segment.modules.values()]
        self.skipped = [module for root in later for module in root.modules() if is_skipped(module)]

    def __call__(self, index: int, outputs: Sequence[Tensor], draw: Draw) -> Tensor:
        """Tokens that the two-way transformer returns.

        Args:
            index: number of the image.
            outputs: of the unit, for the positions drawn.
            draw: which these are.

        Returns:
            (boxes, tokens, C).
        """
        output = outputs[0] if len(outputs) == 1 else tuple(outputs)
        with original_weights(self.target), skipping(self.skipped), self.stream.known(index, output):
            tokens = result_of(self.end, partial(self.forward, index, draw))
        return tokens[self.output]


def two_way_transformer(target: nn.Module) -> nn.Module:
    """The transformer of a SAM in which image and prompts meet."""
    return next(module for module in target.modules() if qualified_name(module) == TWO_WAY_TRANSFORMER)


def is_skipped(module: nn.Module) -> bool:
    """Whether layer skipping leaves a module out."""
    kind = unit_kind(module)
    return kind is not None and kind.skipped


@contextmanager
def skipping(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules return their first argument."""
    for module in modules:
        # an instance attribute hides the method, and deleting it brings the method back
        module.forward = _hand_on
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _hand_on(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x
