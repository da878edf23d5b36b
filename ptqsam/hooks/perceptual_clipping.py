"""Perceptual-consistency clipping (PCC) of SAQ-SAM: ranges that keep what attention looks at. Methods.md 4.1.

q and k of SAM's mask decoder have outliers far outside of all other values. A range that covers them, or that minimises
the error of the values, moves the focus of attention more than one that cuts them off.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor, nn

from ptqsam.checks import check_number, check_whole, is_number
from ptqsam.distributed import decided_by_main
from ptqsam.errors import ConfigError, GateError
from ptqsam.focus import PERCENTILES, PLACES, AttentionFocus, Projection, Range, search_ranges
from ptqsam.functional import lp_error
from ptqsam.modules.sam_decoder_attention import QuantDecoderAttention
from ptqsam.modules.walk import quantizers_off
from ptqsam.modules.watch import captured
from ptqsam.progress import progress
from ptqsam.quantizers import Uniform
from ptqsam.registry import SOLVER_HOOKS
from ptqsam.report.clipping import Clipped, plot_clipping, summarise_clipping, write_clipping
from ptqsam.solver.calibrate import batches_with_boxes
from ptqsam.solver.rules import Choice

if TYPE_CHECKING:
    from mmengine.runner import Runner

FILES = ('clipping.csv', 'clipping.png')
# images that are named in the log
SHOWN = 4
# of one attention: place -> quantizer
Targets = dict[str, Uniform]


@SOLVER_HOOKS.register_module()
class PerceptualClipping(Hook):
    """Choose the ranges of q and k in decoder attention by the focus of the attention, before calibration (PCC).

    For the inputs and outputs of the q and k projections of every decoder attention, as far as they are quantized
    uniformly and per tensor; what others there are, computes in float during the search. Afterwards they are locked:
    the rest is calibrated with them on. To be listed after hooks that change weights: the focus to keep is that of the
    attention as they leave it.

    Deviations from the released code: the first image with prompt boxes is taken, as in the paper, not one picked by
    hand; beyond the percentiles there is the candidate of no clipping; if the search does not end with more overlap
    than the ranges of the recipe's own observers on the same tensors have, it is those that are locked; observers of
    other quantizers do not see the image one more time. With `cascade`, the first pass of the decoder counts.

    Args:
        images: calibration images to search on; those without boxes do not count. Default 1, as published.
        theta: keys with more than this share of the largest attention are in focus; above 0, at most 1. Default 0.5.
        passes: how often each quantizer's turn comes, at least 1. Default 2.
        percentiles: candidates p, ranges between the quantiles 1 - p and p; above 0.5, at most 1. Default: the 29 of
            the publication.

    Raises:
        ConfigError: a value out of range.

    Source: SAQ-SAM, section on perceptual-consistency clipping.
    """

    locked_parts: ClassVar[tuple[str, ...]] = ('decoder',)

    def __init__(
        self, images: int = 1, theta: float = 0.5, passes: int = 2, percentiles: Sequence[float] = PERCENTILES
    ) -> None:
        self.images, self.passes = check_whole(self, 'images', images), check_whole(self, 'passes', passes)
        self.theta = check_number(self, 'theta', theta, at_most=1)
        several = isinstance(percentiles, Sequence) and not isinstance(percentiles, str) and len(percentiles) > 0
        if not several or not all(is_number(p, above=0.5, at_most=1) for p in percentiles):
            raise ConfigError(
                f'PerceptualClipping: percentiles is {percentiles!r}, but must be a list of numbers above 0.5 and at '
                'most 1'
            )
        # smallest first, so that of equals the narrowest range wins; nothing clipped last
        self.percentiles = sorted({*percentiles, 1.0})

    def check(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        """Refuse a model without anything to clip.

        Args:
            model: SAM with quant modules.
            choices: what the rules decided.

        Raises:
            ConfigError: no input or output of a q or k projection is quantized uniformly and per tensor.
        """
        if not find_targets(model):
            raise ConfigError(
                'PerceptualClipping: the recipe quantizes no input or output of a q or k projection of decoder '
                'attention uniformly and per tensor; leave the hook out, or give them Uniform or LSQ with a rule'
            )

    @torch.no_grad()
    def before_calibrate(self, runner: 'Runner') -> None:
        """Search the ranges, and lock them.

        Raises:
            ConfigError: there is nothing to clip, or no calibration image has a prompt box.
            GateError: an input of an attention holds NaN or infinity.
        """
        loop: Any = runner.test_loop
        self.check(loop.target, loop.rules.choices)
        targets = find_targets(loop.target)
        if is_main_process():
            # what an earlier run left must not look like the result of this one
            for name in FILES:
                (loop.work_dir / name).unlink(missing_ok=True)
        with quantizers_off(loop.target), loop.embeddings_of_others(off=True):
            # with other images, other processes might decide otherwise
            names, clipped = decided_by_main(lambda: self.search(loop, targets))
        for path, quantizers in targets.items():
            weight = loop.target.get_submodule(path).q_proj.weight
            for quantizer in quantizers.values():
                row = clipped[quantizer.path]
                quantizer.lock(weight.new_tensor(row.lo), weight.new_tensor(row.hi))
        if is_main_process():
            write_clipping(loop.work_dir / FILES[0], clipped)
            plot_clipping(loop.work_dir / FILES[1], clipped)
            places = len(PLACES) * sum(isinstance(m, QuantDecoderAttention) for m in loop.target.modules())
            runner.logger.info(
                f'PerceptualClipping: {self.describe_images(names)}; {summarise_clipping(clipped, places)}'
            )

    def describe_images(self, names: Sequence[str]) -> str:
        """Which images were searched on, and whether there were too few of them."""
        fewer = ', as many as have boxes' if len(names) < self.images else ''
        shown = ', '.join(names[:SHOWN]) + (', ...' if len(names) > SHOWN else '')
        return f'searched on {len(names)} image{"s" * (len(names) > 1)}{fewer} ({shown})'

    def search(self, loop: Any, targets: Mapping[str, Targets]) -> tuple[list[str], dict[str, Clipped]]:
        """Choose ranges, one attention after the other, so that the inputs of one are in memory at a time.

        Args:
            loop: the loop, all quantizers `off`.
            targets: what to clip.

        Returns:
            Names of the images; and quantizer path -> what was done.
        """
        images = embed_images(loop, self.images)
        clipped: dict[str, Clipped] = {}
        for path, quantizers in progress(targets.items(), 'clip q and k', 'attention', len(targets)):
            attention: Any = loop.target.get_submodule(path)
            inputs = [capture(loop, path, name, *image) for name, *image in images]
            focus = AttentionFocus(
                inputs,
                {side: Projection(layer.weight, layer.bias) for side, layer in projections(attention).items()},
                attention.num_heads,
                {place: (quantizer.bits, quantizer.symmetric) for place, quantizer in quantizers.items()},
                self.theta,
            )
            rows = self.clip(focus, quantizers)
            clipped |= {quantizers[place].path: row for place, row in rows.items()}
        return [name for name, *_ in images], clipped

    def clip(self, focus: AttentionFocus, quantizers: Targets) -> dict[str, Clipped]:
        """Search one attention: place -> what was done."""
        before = {place: observed_range(focus, place, quantizers[place]) for place in focus.grids}
        found = min(search_ranges(focus, self.percentiles, self.passes), key=lambda state: state.distance)
        distance = focus.distance(before)
        kept = found.distance >= distance
        after = before if kept else found.ranges
        both = 1 - distance, 1 - min(distance, found.distance)
        percentiles = {place: None if kept else self.percentiles[found.chosen[place]] for place in focus.grids}
        return {
            place: describe(focus, place, before[place], after[place], percentiles[place], both)
            for place in focus.grids
        }


def projections(attention: nn.Module) -> dict[str, Any]:
    """'q' and 'k' -> linear layer of an attention."""
    return {side: attention.get_submodule(f'{side}_proj') for side in 'qk'}


def find_targets(model: nn.Module) -> dict[str, Targets]:
    """Quantizers to clip: path of each decoder attention that has any -> place -> quantizer."""
    targets = {}
    for path, attention in model.named_modules():
        if isinstance(attention, QuantDecoderAttention):
            layers = projections(attention)
            found = {f'{side}_input': getattr(layer, 'input_quantizer', None) for side, layer in layers.items()}
            found |= {f'{side}_output': attention.get_submodule(side) for side in 'qk'}
            clippable = {
                place: quantizer
                for place, quantizer in found.items()
                if isinstance(quantizer, Uniform) and quantizer.ch_axis is None and not quantizer.locked
            }
            if clippable:
                targets[path] = clippable
    return targets


def embed_images(loop: Any, count: int) -> list[tuple[str, Tensor, Tensor]]:
    """Embed calibration images in the float model, with the boxes that calibration will use.

    Args:
        loop: the loop, all quantizers `off`.
        count: images with boxes to embed, as far as there are so many.

    Returns:
        Name of the image, embedding (1, C, S / 16, S / 16) and boxes (N, 4) of each.

    Raises:
        ConfigError: no image has a box.
    """
    calibration = loop.recipe.calibration
    batches = batches_with_boxes(loop.calib_loader, calibration.max_boxes, calibration.seed)
    images: list[tuple[str, Tensor, Tensor]] = []
    for batch in batches:
        for sample, (image, boxes) in zip(batch['data_samples'], loop.model.sam_inputs(batch), strict=True):
            if len(boxes) and len(images) < count:
                images.append((Path(sample.img_path).name, loop.model.encode(image), boxes))
        if len(images) == count:
            break
    if not images:
        raise ConfigError(
            'PerceptualClipping: no calibration image has a prompt box; choose others, or check the boxes'
        )
    return images


def capture(loop: Any, path: str, name: str, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the q and k projections of an attention, (prompts, tokens, C); one prompt if all are equal.

    Raises:
        GateError: NaN or infinity.
    """
    with captured(loop.target.get_submodule(path), stop=True) as calls:
        loop.model.decode_logits(embedding, boxes)
    args, kwargs = calls[0]
    named = dict(zip('qk', args, strict=False)) | kwargs
    seen = [named[side] for side in 'qk']
    if not all(bool(torch.isfinite(x).all()) for x in seen):
        raise GateError(f'{path}: NaN or infinity in q or k on image {name}; check the checkpoint and the image')
    # the first layer sees one image for all prompts
    q, k = (x[:1].clone() if torch.equal(x, x[:1].expand_as(x)) else x for x in seen)
    return q, k


def observed_range(focus: AttentionFocus, place: str, quantizer: Uniform) -> Range:
    """Range that a quantizer's observer chooses in the float model, every image being a call as in calibration."""
    for image, x in zip(focus.inputs, focus.values(place, {}), strict=True):
        quantizer.observer.update(x.expand(focus.prompts(image), -1, -1))
    bounds = quantizer.observer.bounds()
    quantizer.observer.reset()
    return bounds


def describe(
    focus: AttentionFocus,
    place: str,
    before: Range,
    after: Range,
    percentile: float | None,
    attention: tuple[float, float],
) -> Clipped:
    """What was done to a quantizer.

    Args:
        focus: of its attention.
        place: where it sits.
        before: range of its observer.
        after: chosen range.
        percentile: of the chosen range, None for the observer's.
        attention: overlap with all quantizers on, in their observers' ranges and in the chosen ones.
    """
    values = focus.values(place, {})
    extremes = torch.stack([torch.stack(torch.aminmax(x)) for x in values])
    weights = np.array([x[0].numel() * focus.prompts(image) for image, x in zip(focus.inputs, values, strict=True)])

    def error(bounds: Range) -> float:
        errors = [float(lp_error(x, focus.quantized(x, place, bounds), 2.0)) for x in values]
        return float(np.average(errors, weights=weights))

    return Clipped(
        observed_min=float(extremes[:, 0].min()),
        observed_max=float(extremes[:, 1].max()),
        observer_lo=float(before[0]),
        observer_hi=float(before[1]),
        lo=float(after[0]),
        hi=float(after[1]),
        percentile=percentile,
        overlap_observer=1 - focus.distance({place: before}),
        overlap=1 - focus.distance({place: after}),
        attention_overlap_observer=attention[0],
        attention_overlap=attention[1],
        mse_observer=error(before),
        mse=error(after),
    )
