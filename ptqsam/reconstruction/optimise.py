"""One unit: learn the rounding of its weights and the scales of its activations, then put it on the integer grid.

AdaRound (Nagel et al., ICML 2020), BRECQ (Li et al., ICLR 2021), QDrop (Wei et al., ICLR 2022); methods.md 1.5. The
released SAM repositories keep dropping activations at random afterwards (defect D1) and harden only the first layer of
a unit (D2); here both are undone for every quantizer and operator of the unit, whatever happens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ptqsam.config import Compat, Reconstruction
from ptqsam.errors import GateError
from ptqsam.functional import drop_mask, mix
from ptqsam.modules import QuantOp
from ptqsam.quantizers import LSQ, Quantizer
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.losses import make_loss
from ptqsam.reconstruction.prompts import PromptPath
from ptqsam.reconstruction.rounding import SoftRounding, regulariser_weight, temperature
from ptqsam.reconstruction.sampling import Draw, batch_share, draw_positions
from ptqsam.reconstruction.scales import merge_scales, scale_groups
from ptqsam.reconstruction.streams import Arguments
from ptqsam.reconstruction.units import Unit

# images on which the error of a unit is measured before and after
ERROR_IMAGES = 4


class UnitData:
    """Activations of a unit, one entry per calibration image.

    Args:
        new_cache: makes an empty cache.

    Attributes:
        quantized: inputs in the quantized model, everything before the unit hardened.
        plain: inputs in the float model.
        targets: outputs in the float model.
        shapes: of the tensors of every input.
        output_shapes: of the targets for the first image.
        layout: how the tensors of an input make up the arguments of the unit.
        path: from the outputs of the unit to the prompted tokens, which then are the last of the targets; None: the
            loss looks at the unit's own outputs.
    """

    def __init__(self, new_cache: Callable[[], ActivationCache], path: PromptPath | None = None) -> None:
        self.path = path
        self.quantized, self.plain, self.targets = new_cache(), new_cache(), new_cache()
        self.shapes: list[list[torch.Size]] = []
        self.output_shapes: list[torch.Size] = []
        self.layout: Any = None

    def add_plain(self, arguments: Arguments, outputs: Sequence[Tensor]) -> None:
        """Add input and outputs of an image in the float model."""
        if self.path is not None:
            outputs = [*outputs, self.path(len(self.targets), outputs, Draw())]
        self.plain.append(arguments.tensors)
        self.targets.append(outputs)
        self.output_shapes = self.output_shapes or [tensor.shape for tensor in outputs]

    def add_quantized(self, arguments: Arguments) -> None:
        """Add the input of an image in the quantized model."""
        self.quantized.append(arguments.tensors)
        self.shapes.append([tensor.shape for tensor in arguments.tensors])
        self.layout = arguments.layout

    def clear(self) -> None:
        """Free the memory."""
        for cache in (self.quantized, self.plain, self.targets):
            cache.clear()


@dataclass
class Outcome:
    """What reconstruction did to a unit.

    Attributes:
        nearest: reconstruction loss with weights rounded to nearest and calibrated scales.
        reconstructed: the same after hardening.
        flipped: share of the weights that are not rounded to nearest.
        unsettled: share of the rounding variables that hardening moved.
        losses: reconstruction loss of every iteration, without the regulariser, (iters,) float32.
    """

    nearest: float
    reconstructed: float
    flipped: float
    unsettled: float
    losses: Tensor


@dataclass
class Batch:
    """Activations of one iteration.

    Attributes:
        quantized: inputs in the quantized model.
        plain: inputs in the float model; they also tell padding.
        targets: what the outputs should be.
        drawn: images, and positions of each.
        sizes: entries of each image on the first axis of the targets.
        valid: positions that count, None for all.
    """

    quantized: list[Tensor]
    plain: list[Tensor]
    targets: list[Tensor]
    drawn: list[tuple[int, Draw]]
    sizes: list[int]
    valid: Tensor | None


class Optimiser:
    """Reconstructs one unit.

    Args:
        unit: its weights are quantized by calibrated quantizers; those of activations are on if they take part.
        data: its activations.
        settings: how.
        compat: published defects to reproduce.
        seed: seed of the draws and of the dropping.
    """

    def __init__(self, unit: Unit, data: UnitData, settings: Reconstruction, compat: Compat, seed: int) -> None:
        self.unit = unit
        self.data = data
        self.settings = settings
        self.compat = compat
        self.seed = seed
        self.loss = make_loss(settings)
        self.regulariser = settings.regulariser
        self.device = next(iter(unit.ops.values())).weight.device

    def run(self, on_iteration: Callable[[int, Tensor], None]) -> Outcome:
        """Reconstruct the unit; afterwards its weights are hard and nothing is dropped.

        Args:
            on_iteration: called with the number of the iteration and its reconstruction loss.

        Raises:
            GateError: a hard weight lies off its grid, or the loss is not finite.
        """
        nearest = self.error()
        if self.settings.activations:
            for quantizer in self.unit.act_quantizers:
                quantizer.start_learning()
        if self.settings.relative_regulariser:
            self.regulariser *= nearest / sum(op.weight.numel() for op in self.unit.ops.values())
        devices = [self.device] if self.device.type == 'cuda' else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            try:
                losses = self.learn(on_iteration)
            finally:
                self.stop_dropping()
        flipped, unsettled = self.harden()
        if not bool(torch.isfinite(losses).all()):
            raise GateError(
                f'{self.unit.name}: the reconstruction loss became NaN or infinite; lower reconstruction.weight_lr and '
                'reconstruction.scale_lr'
            )
        return Outcome(nearest, self.error(), flipped, unsettled, losses)

    def learn(self, on_iteration: Callable[[int, Tensor], None]) -> Tensor:
        """All iterations; returns the reconstruction loss of each."""
        settings = self.settings
        roundings = self.soften()
        optimiser = torch.optim.Adam(self.parameter_groups(roundings), fused=True)
        initial = [group['lr'] for group in optimiser.param_groups]
        losses = torch.empty(settings.iters, device=self.device)
        batches, first = self.batches(), 1
        for step in range(1, settings.iters + 1):
            if settings.activations and merge_scales(self.unit.act_quantizers, optimiser, step, settings.iters):
                first = step  # the cosine starts over
            for group, lr in zip(optimiser.param_groups, initial, strict=True):
                fall = (1 + math.cos(math.pi * (step - first) / settings.iters)) / 2
                group['lr'] = lr * fall if group['decays'] else lr
            losses[step - 1] = self.descend(optimiser, roundings, step, next(batches))
            on_iteration(step, losses[step - 1])
        return losses

    def descend(
        self, optimiser: torch.optim.Optimizer, roundings: Sequence[SoftRounding], step: int, batch: Batch
    ) -> Tensor:
        """One iteration; returns its reconstruction loss, detached, so that no graph outlives a change of shapes."""
        settings = self.settings
        loss = total = self.step_loss(batch)
        weight = regulariser_weight(step, settings.iters, settings.warm_up, self.regulariser)
        if weight:
            exponent = temperature(step, settings.iters, settings.warm_up, settings.b_range)
            total = total + weight * torch.stack([rounding.regulariser(exponent) for rounding in roundings]).sum()
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        optimiser.step()
        return loss.detach()

    def soften(self) -> list[SoftRounding]:
        """Give every weight of the unit a soft rounding."""
        roundings = []
        for op in self.unit.ops.values():
            op.rounding = SoftRounding(op.weight, cast(Quantizer, op.weight_quantizer))
            roundings.append(op.rounding)
        return roundings

    def parameter_groups(self, roundings: Sequence[SoftRounding]) -> list[dict[str, Any]]:
        """Rounding variables, and scales each with its learning rate."""
        settings = self.settings
        alphas = [rounding.alpha for rounding in roundings]
        groups: list[dict[str, Any]] = [dict(params=alphas, lr=settings.weight_lr, decays=False)]
        if not settings.activations:
            return groups
        for quantizer in self.unit.act_quantizers:
            quantizer.drop_prob = settings.drop_prob
        return groups + scale_groups(self.unit.act_quantizers, settings)

    def batches(self) -> Any:
        """Endless activations for one iteration after the other; the next one is on its way meanwhile."""
        rng = np.random.default_rng(self.seed)
        following = self.draw(rng)
        while True:
            current, following = following, self.draw(rng)
            yield self.fetch(current)

    def draw(self, rng: np.random.Generator) -> list[tuple[int, Draw]]:
        """Images and positions of an iteration."""
        size, share = batch_share(self.settings, len(self.data.targets))
        images = rng.choice(len(self.data.targets), size=size, replace=False)
        drawn: list[tuple[int, Draw]] = []
        for index in images.tolist():
            # query rows are an argument of the call, so all images have the same
            same = drawn and drawn[0][1].arguments
            draw = drawn[0][1] if same else draw_positions(self.unit, self.data.shapes[index], share, rng)
            drawn.append((index, draw))
            for cache, select in self.selections(draw):
                cache.prefetch(index, select)
        return drawn

    def selections(self, draw: Draw) -> list[tuple[ActivationCache, Any]]:
        """What to take of which cache."""
        return [
            (self.data.quantized, draw.inputs),
            (self.data.plain, draw.inputs),
            (self.data.targets, draw.outputs),
        ]

    def fetch(self, drawn: list[tuple[int, Draw]]) -> Batch:
        """Activations of all images of an iteration, in one batch."""
        parts = [[cache.get(index, select) for cache, select in self.selections(draw)] for index, draw in drawn]
        quantized, plain, targets = (
            [tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in zip(*kind, strict=True)]
            for kind in zip(*parts, strict=True)
        )
        masks = [draw.valid(part[1]) for (_, draw), part in zip(drawn, parts, strict=True)]
        present = [mask for mask in masks if mask is not None]
        valid = torch.cat(present) if present else None
        sizes = [len(part[2][0]) for part in parts]
        return Batch(quantized, plain, targets, drawn, sizes, valid)

    def step_loss(self, batch: Batch) -> Tensor:
        """Reconstruction loss of an iteration."""
        inputs = batch.quantized
        if self.settings.activations and self.settings.drop_prob < 1:
            inputs = [
                mix(drop_mask(q, self.settings.drop_prob), q, plain) if q.is_floating_point() else q
                for q, plain in zip(batch.quantized, batch.plain, strict=True)
            ]
        outputs, targets = self.run_unit(inputs, batch.drawn, batch.sizes), batch.targets
        if self.compat.loss_dim1:
            # A sum over dimension 1 of all positions is the sum over channels times this ratio. Positions that were
            # drawn have lost that dimension, so the ratio is what can be reproduced for all of them.
            pairs = zip(self.data.output_shapes, self.channel_axes(len(outputs)), strict=True)
            ratios = [(shape[1] / shape[axis]) ** 0.5 for shape, axis in pairs]
            outputs = [output * ratio for output, ratio in zip(outputs, ratios, strict=True)]
            targets = [target * ratio for target, ratio in zip(targets, ratios, strict=True)]
        return self.compare(outputs, targets, batch.valid)

    def run_unit(self, inputs: Sequence[Tensor], drawn: Sequence[tuple[int, Draw]], sizes: list[int]) -> list[Tensor]:
        """Outputs of the unit and, if it is followed, the prompted tokens that they lead to.

        Args:
            inputs: tensors of its arguments, of all images of a batch.
            drawn: these images, and positions of each.
            sizes: entries of each image on the first axis of the outputs.
        """
        args, kwargs = Arguments.restore(inputs, self.data.layout)
        outputs = tree_leaves(self.unit(*args, **kwargs, **drawn[0][1].arguments))
        path = self.data.path
        if path is None:
            return outputs
        per_image = zip(*(output.split(sizes) for output in outputs), strict=True)
        tokens = [path(index, own, draw) for (index, draw), own in zip(drawn, per_image, strict=True)]
        return [*outputs, tokens[0] if len(tokens) == 1 else torch.cat(tokens)]

    def channel_axes(self, count: int) -> list[int]:
        """Channel axis of each of so many targets; prompted tokens are (boxes, tokens, C)."""
        own = count - (self.data.path is not None)
        return [self.unit.channel_axis] * own + [-1] * (count - own)

    def compare(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], valid: Tensor | None) -> Tensor:
        """Loss between outputs of the unit and what they should be, one call for all of them.

        Args:
            outputs: of the quantized unit.
            targets: of the float unit, same shapes.
            valid: positions that count, None for all.
        """
        # a loss that knows nothing of prompts need not take the argument
        extra = {} if self.data.path is None else {'followed_to': self.unit.followed_to}
        return self.loss(outputs, targets, self.channel_axes(len(outputs)), valid, **extra)

    @torch.no_grad()
    def error(self) -> float:
        """Loss with everything quantized, on some images, all positions."""
        count = min(ERROR_IMAGES, len(self.data.targets))
        losses = []
        for index in range(count):
            draw = draw_positions(self.unit, self.data.shapes[index], None, np.random.default_rng(0))
            inputs, plain, targets = (cache.get(index, select) for cache, select in self.selections(draw))
            outputs = self.run_unit(inputs, [(index, draw)], [len(targets[0])])
            losses.append(self.compare(outputs, targets, draw.valid(plain)))
        return float(torch.stack(losses).mean())

    def stop_dropping(self) -> None:
        """Quantize everything again, and record no gradients any more."""
        reset_drop_prob(self.unit, self.settings, self.compat)
        for quantizer in self.unit.act_quantizers:
            for parameter in quantizer.learnable().values():
                parameter.requires_grad_(False)
                parameter.grad = None
            if isinstance(quantizer, LSQ):
                # the last step may have pushed it through zero; what the arithmetic uses is its magnitude
                quantizer.scale.data.copy_(quantizer.used_scale())

    def harden(self) -> tuple[float, float]:
        """Put every weight of the unit on its integer grid.

        Returns:
            Share of the weights not rounded to nearest, and of the rounding variables that were neither 0 nor 1.

        Raises:
            GateError: a weight lies off its grid.
        """
        counts = [op.weight.numel() for op in self.unit.ops.values()]
        shares = []
        for position, (path, op) in enumerate(self.unit.ops.items()):
            rounding = cast(SoftRounding, op.rounding)
            shares.append(torch.stack([rounding.flipped(), rounding.unsettled()]))
            soft = self.compat.soft_weights and position > 0
            op.freeze(soft)
            if not soft:
                check_on_grid(path, op)
        weights = torch.tensor(counts, dtype=torch.float64)
        mean = (torch.stack(shares).cpu().double() * weights[:, None]).sum(0) / weights.sum()
        return float(mean[0]), float(mean[1])


def reset_drop_prob(unit: Unit, settings: Reconstruction, compat: Compat) -> None:
    """Let the quantizers of a unit quantize everything; with a compat switch all but those of inputs (defect D1).

    Args:
        unit: after its reconstruction.
        settings: give the probability that stays with the switch.
        compat: with or without `keep_drop_prob`.
    """
    forgotten = {id(op.input_quantizer) for op in unit.ops.values()} if compat.keep_drop_prob else set()
    for quantizer in unit.act_quantizers:
        kept = settings.activations and id(quantizer) in forgotten
        quantizer.drop_prob = settings.drop_prob if kept else 1.0


def check_on_grid(path: str, op: QuantOp) -> None:
    """Refuse a weight that is not made of integer codes.

    Args:
        path: of the operator, for the message.
        op: hardened operator.

    Raises:
        GateError: with the operator's path.
    """
    quantizer = cast(Quantizer, op.weight_quantizer)
    if not torch.equal(quantizer.decode(quantizer.encode(op.weight)), op.weight):
        raise GateError(f'{path}.weight: off its integer grid after reconstruction')
