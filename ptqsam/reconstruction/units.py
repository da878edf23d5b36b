"""Units, the smallest things reconstructed, and segments, the chain of modules along which activations are streamed.

Both are found through the quant modules and the table in `ptqsam.modules.unit_kinds`, in the order of execution, which
differs from the order of registration (TinyViT registers the MLP of a block before the convolution that precedes it).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from ptqsam.config import PARTS, PartName, Reconstruction, UnitLevel
from ptqsam.errors import ConfigError
from ptqsam.modules import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantNorm, QuantOp
from ptqsam.modules.base import qualified_name
from ptqsam.modules.unit_kinds import unit_kind
from ptqsam.modules.walk import act_quantizers, quant_ops
from ptqsam.quantizers import Quantizer
from ptqsam.reconstruction.losses import is_prompt_aware

# what a crop of an image may pass through: it treats all positions alike
_POINTWISE = (nn.BatchNorm2d, nn.GELU, nn.ReLU, nn.Identity, nn.Conv2d, QuantConv2d, QuantNorm)
_POINTWISE_NAMES = ('segment_anything.modeling.common.LayerNorm2d',)


@dataclass(eq=False)
class Unit:
    """One or several modules that are reconstructed together.

    Attributes:
        name: path of the module, or 'first..last' of several.
        modules: path -> module, executed one after the other on each other's output.
        positions: how a part of the input is drawn.
        channel_axis: axis of the channels in its outputs.
        reach: how far, in input pixels, a convolutional unit looks around.
        stride: input pixels per output pixel.
        followed_to: which output of the two-way transformer its loss looks at (`ptqsam.modules.unit_kinds`); None: its
            own outputs are all.
    """

    name: str
    modules: dict[str, nn.Module]
    positions: str = 'batch'
    channel_axis: int = -1
    reach: int = 0
    stride: int = 1
    followed_to: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the modules."""
        first, *others = self.modules.values()
        result = first(*args, **kwargs)
        for module in others:
            result = module(result)
        return result

    @property
    def first(self) -> nn.Module:
        """The module that gets the input."""
        return next(iter(self.modules.values()))

    @property
    def last(self) -> nn.Module:
        """The module that makes the output."""
        return list(self.modules.values())[-1]

    @cached_property
    def ops(self) -> dict[str, QuantOp]:
        """Path -> operator with a quantized weight."""
        return {
            f'{path}.{name}'.rstrip('.'): op
            for path, module in self.modules.items()
            for name, op, _ in quant_ops(module)
        }

    @cached_property
    def act_quantizers(self) -> list[Quantizer]:
        """Quantizers of activations."""
        return [quantizer for module in self.modules.values() for quantizer in act_quantizers(module)]


@dataclass(eq=False)
class Segment(Unit):
    """A link of the chain of modules that an image passes through.

    Attributes:
        units: what is reconstructed in it, in the order of execution.
    """

    units: list[Unit] = field(default_factory=list)


def find_parts(
    model: nn.Module, settings: Reconstruction, forwards: Sequence[Callable[[], Any]]
) -> dict[PartName, list[Segment]]:
    """Segments and units of the encoder and of the decoder, as a recipe wants them.

    Args:
        model: SAM with quant modules, on any device, the meta device too.
        settings: of the reconstruction.
        forwards: of the image encoder and of the mask decoder.

    Returns:
        Part -> its segments in the order of execution. An encoder that is not reconstructed has no units, but leads to
        the decoder; a decoder that is not has no segments.

    Raises:
        ConfigError: a module that is to be a unit runs more than once in a forward.
    """
    parts: dict[PartName, list[Segment]] = {part: [] for part in PARTS}
    # a decoder that is not reconstructed need not run
    needed = PARTS if 'decoder' in settings.parts else PARTS[:1]
    levels = {part: settings.of(part).unit for part in needed}
    found = {level: find_segments(model, level, forwards[: len(needed)]) for level in dict.fromkeys(levels.values())}
    for number, part in enumerate(needed):
        parts[part] = found[levels[part]][number]
        follow = is_prompt_aware(settings.of(part).loss)
        for segment in parts[part]:
            if part not in settings.parts:
                segment.units = []
            kind = unit_kind(segment.last)
            for unit in segment.units:
                if follow and kind is not None and unit.modules == segment.modules:
                    unit.followed_to = kind.followed_to
                if unit.followed_to is not None:
                    unit.positions = 'batch'  # what follows needs the whole image
    return parts


def find_segments(model: nn.Module, level: UnitLevel, forwards: Sequence[Callable[[], Any]]) -> list[list[Segment]]:
    """Segments and their units.

    Args:
        model: SAM with quant modules, on any device, the meta device too.
        level: unit level.
        forwards: parts of the model's forward pass, each run once: the image encoder, the mask decoder.

    Returns:
        For each forward its segments, in the order of execution. What is not executed is in none of them.

    Raises:
        ConfigError: a module that is to be a unit runs more than once in a forward.
    """
    segments = [
        Segment(name, modules) for name, modules in _partition(model, 'stage' if level == 'stage' else 'block', True)
    ]
    for segment in segments:
        for path, module in segment.modules.items():
            if level in ('block', 'stage') or isinstance(module, QuantOp):
                continue
            segment.units += [Unit(*found) for found in _partition(module, level, False, path)]
        if not segment.units and segment.ops:
            segment.units = [Unit(segment.name, segment.modules)]
    parts = []
    for forward in forwards:
        order = _execution_order(model, forward)
        run = sorted((s for s in segments if s.first in order), key=lambda segment: order[segment.first])
        for segment in run:
            segment.units = [unit for unit in segment.units if unit.first in order]
            segment.units.sort(key=lambda unit: order[unit.first])
            for unit in segment.units:
                _describe(unit, order)
        parts.append(run)
    return parts


def _partition(
    module: nn.Module, level: UnitLevel, with_float: bool, path: str = ''
) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Cut a module tree into units of a level: name and modules of each, in the order of registration.

    Args:
        module: root.
        level: unit level.
        with_float: also yield declared modules in which nothing is quantized, so that they can be streamed past.
        path: path of ``module``.
    """
    if isinstance(module, QuantOp) and isinstance(module.weight_quantizer, Quantizer):
        yield path, {path: module}
        return
    if not with_float and not any(True for _ in quant_ops(module)):
        return
    kind = unit_kind(module)
    order = ('module', 'block', 'stage')
    whole = kind is not None and level != 'layer' and order.index(kind.level) <= order.index(level)
    if whole or (level != 'layer' and _is_plain_sequence(module)):
        yield path, {path: module}
        return
    run: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        child_path = f'{path}.{name}' if path else name
        ends_stage = getattr(unit_kind(child), 'ends_stage', None)
        if level == 'stage' and ends_stage is not None:
            run[child_path] = child
            if ends_stage(child):
                yield _run_name(run), run
                run = {}
            continue
        if run:
            yield _run_name(run), run
            run = {}
        yield from _partition(child, level, with_float, child_path)
    if run:
        yield _run_name(run), run


def _run_name(run: dict[str, nn.Module]) -> str:
    paths = list(run)
    return paths[0] if len(paths) == 1 else f'{paths[0]}..{paths[-1].rpartition(".")[2]}'


def _is_plain_sequence(module: nn.Module) -> bool:
    """Whether a module is a sequence of operators, such as SAM's neck, and nothing in it is a unit by itself."""
    inner = [m for m in module.modules() if m is not module]
    return (
        isinstance(module, nn.Sequential)
        and any(isinstance(m, QuantOp) for m in inner)
        and all(unit_kind(m) is None for m in inner)
    )


def _execution_order(model: nn.Module, forward: Callable[[], Any]) -> dict[nn.Module, int]:
    """Modules that a forward runs, with the number of the call; what is no unit may run several times.

    Raises:
        ConfigError: a quantized operator runs more than once.
    """
    order: dict[nn.Module, int] = {}
    count = 0

    def note(module: nn.Module, args: Any) -> None:
        nonlocal count
        quantizer = module.weight_quantizer if isinstance(module, QuantOp) and not module.frozen else None
        if module in order and isinstance(quantizer, Quantizer):
            raise ConfigError(
                'reconstruction: an operator runs more than once in a forward pass, so it has no single input; exclude '
                f'it with a rule ({quantizer.path})'
            )
        order.setdefault(module, count)
        count += 1

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return order


def _describe(unit: Unit, order: dict[nn.Module, int]) -> None:
    """Fill in how positions are drawn and where the channels are."""
    ops = sorted((op for op in unit.ops.values() if op in order), key=lambda op: order[op])
    last = unit.last
    kind = unit_kind(last)
    axis = kind.channel_axis if kind is not None else None
    if axis is None:
        axis = 1 if ops and isinstance(ops[-1], QuantConv2d | QuantConvTranspose2d) else -1
    unit.channel_axis = axis
    if len(unit.modules) > 1:
        unit.positions = 'batch'
    elif kind is not None:
        unit.positions = kind.positions
    elif isinstance(last, QuantLinear):
        unit.positions = 'tokens'
    else:
        unit.positions = 'crop' if _treats_positions_alike(last) else 'batch'
    # convolutions that stay in floating point look around and step, too
    inside = {module for part in unit.modules.values() for module in part.modules() if module in order}
    for conv in sorted(inside, key=lambda module: order[module]) if unit.positions == 'crop' else ():
        if isinstance(conv, QuantConv2d | nn.Conv2d):
            unit.reach += (conv.weight.shape[-1] - 1) // 2 * conv.dilation[0] * unit.stride
            unit.stride *= conv.stride[0]


def _treats_positions_alike(module: nn.Module) -> bool:
    """Whether a crop of the input gives a crop of the output, but for its border."""
    parts: Iterable[nn.Module] = module if isinstance(module, nn.Sequential) else [module]
    return all(isinstance(part, _POINTWISE) or qualified_name(part) in _POINTWISE_NAMES for part in parts)
