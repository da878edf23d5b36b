"""Scale reparameterisation of RepQ-ViT: a range for every channel behind a LayerNorm, at the price of one for all.

The channels of a LayerNorm's output differ much in range, and a per-tensor grid has to be as wide as the widest. The
LayerNorm has a gain and a bias for every channel, though, and the linear layer that reads it a column of weights: what
the one does to a channel the other can undo. So the ranges of the channels are moved onto each other. The model
computes the same as before, and one scale gives each channel the codes that a scale of its own would give it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor, nn

from ptqsam.errors import ConfigError
from ptqsam.modules import QuantNorm, QuantOp
from ptqsam.modules.norm_feeds import NormFeed, norm_feeds
from ptqsam.modules.walk import quantizers_off
from ptqsam.observers.channels import ChannelStatistics
from ptqsam.quantizers import Uniform
from ptqsam.registry import OBSERVERS, SOLVER_HOOKS, build_part
from ptqsam.reparameterization import ChannelGrids, anchored_grids, free_grids, move_ranges
from ptqsam.solver.calibrate import own_batches
from ptqsam.solver.rules import Choice

if TYPE_CHECKING:
    from mmengine.runner import Runner

# as in the released code, which takes the best of them for each channel
OBSERVER = dict(type='Percentile', percentile=(0.999, 0.9999, 0.99999))


@dataclass(frozen=True)
class Pair:
    """A LayerNorm and the linear layer that reads it.

    Attributes:
        owner: module that holds the norm.
        name: attribute of the norm there.
        op: the layer, with a uniform quantizer per tensor on its input.
        pads: whether zeros may be put between the two.
    """

    owner: nn.Module
    name: str
    op: QuantOp
    pads: bool

    @property
    def norm(self) -> nn.LayerNorm:
        """The norm that is there now."""
        norm = self.owner.get_submodule(self.name)
        assert isinstance(norm, nn.LayerNorm)
        return norm

    @property
    def quantizer(self) -> Uniform:
        """The quantizer between the two."""
        assert isinstance(self.op.input_quantizer, Uniform)
        return self.op.input_quantizer

    @property
    def shifts(self) -> bool:
        """Whether channels may be shifted: no zero must stay zero, and the biases take the shift up."""
        # op.original shares the bias with op.weight, and would need another one
        return not self.pads and self.norm.bias is not None and self.op.bias is not None and self.op.original is None

    def grids(self, lo: Tensor, hi: Tensor) -> ChannelGrids:
        """Grids for ranges of the channels, (C,) each."""
        settings = self.quantizer.bits, self.quantizer.symmetric
        if self.shifts:
            return free_grids(lo, hi, *settings)
        return anchored_grids(lo, hi, self.op.weight.detach().double().square().sum(0), *settings)

    def move(self, grids: ChannelGrids) -> None:
        """Change norm and layer, and give the quantizer the common grid for good."""
        setattr(self.owner, self.name, move_ranges(self.norm, self.op, grids))
        self.quantizer.lock_at(grids.scale, grids.zero_point)


@SOLVER_HOOKS.register_module()
class ScaleReparameterization(Hook):
    """Give the linear layers behind LayerNorms of the encoder one scale that does the work of one per channel.

    In `before_calibrate` the calibration images run through the encoder of the float model once; ranges of the channels
    come from a sample (`ChannelStatistics`). Then scales and zero points of the channels are moved into LayerNorm,
    weight and bias, and the quantizers of the inputs are locked. The float model computes the same as before.

    SAM's windowed attention pads with zeros behind the norm, and attends to them. A shift would change what they mean,
    so there the channels have scales of their own but a common zero point (`anchored_grids`); so it is where there is
    no bias, or another hook has replaced the weight before.

    Deviations from the released code: that common zero point (SAQ-SAM's port shifts, padding or not); a whole
    mean zero point (`free_grids`); a dead channel does not divide by zero; candidates for a range are compared by
    |x_hat - x|^2.4 on grids that contain zero, there by the squared error on the grid itself.

    Args:
        observer: config of the observer that chooses the range of every channel. Default Percentile with the best of
            0.999, 0.9999 and 0.99999, as published.

    Raises:
        ConfigError: no such observer, or arguments that it refuses.

    Source: RepQ-ViT (Li et al., ICCV 2023, arXiv 2212.08254).
    """

    # it also changes weights, but no values except those that it locks itself
    locked_parts: ClassVar[tuple[str, ...]] = ('encoder',)
    # beside the calibration; for the dry run
    calibration_passes = 1

    def __init__(self, observer: dict[str, Any] | None = None) -> None:
        self.observer = OBSERVER if observer is None else observer
        given = self.observer if isinstance(self.observer, dict) else {}
        if not isinstance(given.get('type'), str) or given.keys() & {'bits', 'symmetric', 'ch_axis'}:
            raise ConfigError(
                f'ScaleReparameterization: observer is {observer!r}, but must be the config of one, as {{type: MinMax}}'
                '; bits, symmetric and ch_axis are those of the quantizer'
            )
        self.make_observer(8, False)  # refuses what is wrong with it at once

    def make_observer(self, bits: int, symmetric: bool) -> ChannelStatistics:
        """Observer of the channels of one tensor."""
        inner = build_part(OBSERVERS, **self.observer, bits=bits, symmetric=symmetric, ch_axis=-1)
        return ChannelStatistics(inner)

    def check(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        """Refuse a model in which no LayerNorm feeds a layer with a uniform quantizer per tensor.

        Args:
            model: SAM with quant modules.
            choices: what the rules decided.

        Raises:
            ConfigError: there is none.
        """
        if not find_pairs(model):
            raise ConfigError(
                'ScaleReparameterization: no linear layer behind a LayerNorm of the encoder has a uniform quantizer '
                'per tensor on its input; leave the hook out, or give role:*.qkv.input or role:mlp.lin1.input Uniform '
                'or LSQ with a rule'
            )

    @torch.no_grad()
    def before_calibrate(self, runner: 'Runner') -> None:
        """Observe the channels, move their ranges onto each other, lock the quantizers.

        Raises:
            ConfigError: there is nothing to do.
            GateError: an activation is NaN or infinite, or there is no calibration image.
        """
        loop: Any = runner.test_loop
        self.check(loop.target, loop.rules.choices)
        pairs = find_pairs(loop.target)
        spreads = []
        for pair, observer in zip(pairs, self.observe(loop, pairs), strict=True):
            with pair.quantizer.named_errors():
                grids = pair.grids(*observer.bounds())
            pair.move(grids)
            spreads.append(float(grids.scales.max() / grids.scales.median()))
        if is_main_process():
            anchored = sum(not pair.shifts for pair in pairs)
            runner.logger.info(
                f'ScaleReparameterization: {len(pairs)} layers, {anchored} of them with a common zero point; largest '
                f'scale of a channel over the median one: {min(spreads):.3g} to {max(spreads):.3g}, in the median '
                f'{median(spreads):.3g}'
            )

    def observe(self, loop: Any, pairs: Sequence[Pair]) -> list[ChannelStatistics]:
        """Run all calibration images through the encoder, and observe what reaches the layers."""
        observers = [self.make_observer(pair.quantizer.bits, pair.quantizer.symmetric) for pair in pairs]
        watched = {pair.op: observer for pair, observer in zip(pairs, observers, strict=True)}
        named = {
            f'channels of {pair.quantizer.path}': observer for pair, observer in zip(pairs, observers, strict=True)
        }

        def watch() -> None:
            calibration = loop.recipe.calibration
            batches = own_batches(loop.calib_loader, calibration.max_boxes, calibration.seed, 'channel ranges')
            with watch_inputs(watched):
                for number, batch in batches:
                    for observer in observers:
                        observer.turn = number
                    for image, _ in loop.model.sam_inputs(batch):
                        loop.model.encode(image)
            for observer in observers:
                observer.synchronize()

        with quantizers_off(loop.target):
            if loop.shared_calibration is None:
                watch()
            else:
                loop.shared_calibration.watch_once(named, watch)
        return observers


def find_pairs(model: nn.Module) -> list[Pair]:
    """LayerNorms with a weight that feed a layer whose input has a uniform quantizer per tensor, not locked so far."""
    pairs = [make_pair(module, feed) for module in model.modules() for feed in norm_feeds(module)]
    return [pair for pair in pairs if pair is not None]


def make_pair(module: nn.Module, feed: NormFeed) -> Pair | None:
    """A norm of a module and its layer; None where nothing can be done about them."""
    op, norm = module.get_submodule(feed.layer), module.get_submodule(feed.norm)
    owner, name = (norm, 'norm') if isinstance(norm, QuantNorm) else (module, feed.norm)
    norm = owner.get_submodule(name)
    if not isinstance(op, QuantOp) or not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        return None
    quantizer = op.input_quantizer
    if not isinstance(quantizer, Uniform) or quantizer.ch_axis is not None or quantizer.locked:
        return None
    return Pair(owner, name, op, feed.pads is not None and feed.pads(module))


@contextmanager
def watch_inputs(observers: Mapping[QuantOp, ChannelStatistics]) -> Iterator[None]:
    """Show observers what reaches their operators."""

    def watcher(observer: ChannelStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: observer.update(args[0].float())

    handles = [op.register_forward_pre_hook(watcher(observer)) for op, observer in observers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
