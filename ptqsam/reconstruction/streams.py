"""The two streams: activations of the float model and of the quantized one, advanced together, segment by segment.

The released code runs the whole model from the image to the unit, for every unit, image and stream, detector included.
Here both streams stand at the input of the current segment. A segment is run from there; the glue between segments
(permutations, residual additions outside, token embeddings) is run by calling the model with all finished segments
replaced by their outputs, so the whole reconstruction costs a few forward passes whatever the number of units.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from ptqsam.errors import ConfigError
from ptqsam.modules.watch import captured
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.units import Segment, Unit

NewCache = Callable[[], ActivationCache]
_TENSOR = object()


@dataclass
class Arguments:
    """Arguments of a module, as tensors and how they are arranged.

    Attributes:
        tensors: in the order of `tree_flatten`.
        layout: positions, names and everything that is no tensor.
    """

    tensors: list[Tensor]
    layout: tuple[TreeSpec, list[Any]]

    @classmethod
    def of(cls, value: Any) -> 'Arguments':
        """Take a structure apart."""
        leaves, spec = tree_flatten(value)
        constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls([leaf for leaf in leaves if isinstance(leaf, Tensor)], (spec, constants))

    @staticmethod
    def restore(tensors: Sequence[Tensor], layout: tuple[TreeSpec, list[Any]]) -> Any:
        """Put a structure together from other tensors."""
        spec, constants = layout
        rest = iter(tensors)
        return tree_unflatten([next(rest) if constant is _TENSOR else constant for constant in constants], spec)


class Stream:
    """One model's activations at the input of the current segment, one entry per image.

    Args:
        forwards: one per image; runs the part of the model that the segments are of.
        segments: chain of that part, in the order of execution.
        new_cache: makes an empty cache.

    Attributes:
        position: index of the current segment.
        inputs: its arguments, per image.
    """

    def __init__(self, forwards: Sequence[Callable[[], Any]], segments: Sequence[Segment], new_cache: NewCache) -> None:
        self.forwards = forwards
        self.segments = segments
        self.new_cache = new_cache
        self.position = 0
        self.layout: Any = None
        # per image: they need not have the same number of boxes
        self.placeholders: list[list[Any]] = [[] for _ in forwards]
        self.inputs = new_cache()
        for index in range(len(forwards)):
            arguments = self._reach(index, None)
            self.inputs.append(arguments.tensors)
            self.layout = arguments.layout

    @classmethod
    def standing(cls, segments: Sequence[Segment], position: int, outputs: Sequence[Any]) -> 'Stream':
        """Stand at a segment with one image, without activations: enough to tell what follows it.

        Args:
            segments: as in the constructor.
            position: index of the segment.
            outputs: of all segments before it.
        """
        stream = cls((), segments, cast(NewCache, list))
        stream.position, stream.placeholders = position, [list(outputs[:position])]
        return stream

    @torch.no_grad()
    def run(self, index: int) -> Any:
        """Output of the current segment for an image."""
        args, kwargs = Arguments.restore(self.inputs.get(index), self.layout)
        return self.segments[self.position](*args, **kwargs)

    @torch.no_grad()
    def run_until(self, unit: Unit, index: int) -> Arguments:
        """Run the current segment on an image as far as a unit.

        Args:
            unit: of the current segment.
            index: number of the image.

        Returns:
            Arguments of the unit.
        """
        with captured(unit.first, stop=True) as calls:
            self.run(index)
        return Arguments.of(calls[0])

    @torch.no_grad()
    def advance(self, output_of: Callable[[int], Any]) -> list[Any]:
        """Go to the next segment.

        Args:
            output_of: image -> output of the current segment.

        Returns:
            What the forward passes returned, per image, if the current segment was the last one.
        """
        following, layout, results = self.new_cache(), None, []
        last = self.position + 1 == len(self.segments)
        for index in range(len(self.forwards)):
            output = output_of(index)
            if last:
                results.append(self._finish(index, output))
            else:
                arguments = self._reach(index, output)
                following.append(arguments.tensors)
                layout = arguments.layout
            # only now: the segment is still known by its output
            self.placeholders[index].append(tree_map(placeholder, output))
        self.inputs.clear()
        self.inputs, self.layout = following, layout
        self.position += 1
        return results

    def _reach(self, index: int, output: Any) -> Arguments:
        """Arguments of the segment after those whose outputs are known."""
        following = self.segments[0 if output is None else self.position + 1]
        with torch.no_grad(), self.known(index, output), captured(following.first, stop=True) as calls:
            self.forwards[index]()
        arguments = Arguments.of(calls[0])
        for tensor in arguments.tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f'reconstruction: the input of {following.name} is NaN or infinite: either the checkpoint or an '
                    'image is damaged, or it depends on more than the block before and cannot be reconstructed; leave '
                    'it in floating point then (enabled: false)'
                )
        return arguments

    def _finish(self, index: int, output: Any) -> Any:
        """What the forward pass of an image returns."""
        with self.known(index, output):
            return self.forwards[index]()

    @contextmanager
    def known(self, index: int, output: Any) -> Iterator[None]:
        """Let segments return what is known of an image: the current one its output, the earlier ones NaN.

        Nothing after a segment may depend on those before it; if it does, the NaN shows.

        Args:
            index: number of the image.
            output: of the current segment, or None: no segment has one yet.
        """
        finished = self.segments[: 0 if output is None else self.position + 1]
        outputs = [*self.placeholders[index], output]
        patched: list[nn.Module] = []
        try:
            for segment, value in zip(finished, outputs, strict=False):
                modules = list(segment.modules.values())
                for module in modules:
                    # an instance attribute hides the method, and deleting it brings the method back
                    module.forward = partial(_known, value if module is modules[-1] else None)
                    patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward


def _known(output: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a finished module: its output, or in the middle of a segment whatever comes in."""
    return args[0] if output is None else output


def placeholder(value: Any) -> Any:
    """A tensor of the same shape that takes no memory."""
    return torch.full((), torch.nan, device=value.device).expand(value.shape) if isinstance(value, Tensor) else value
