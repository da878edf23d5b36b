"""What the reconstruction of a recipe will cost, for the dry run."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptqsam.config import PARTS, Part, QuantConfig, Reconstruction
from ptqsam.errors import ConfigError
from ptqsam.estimate import Machine
from ptqsam.reconstruction.cache import choose_store
from ptqsam.reconstruction.engine import Sample
from ptqsam.reconstruction.footprint import Step, cache_bytes, iteration_steps
from ptqsam.reconstruction.losses import follows_prompts
from ptqsam.reconstruction.optimise import ERROR_IMAGES
from ptqsam.report.summary import part_text

# Cost of a fake-quantized forward pass over a float one. Passes of all calibration images that bring both streams
# through the model: one of the float model; one of the quantized model, and on the way to its units parts that add up
# to about half of one. MobileSAM at W4A4 on a busy CPU, 2 images, 3 iterations: 51 s for 51 s.
QUANTIZED_COST = 2
STREAM_PASSES = 1 + 1.5 * QUANTIZED_COST
INDENT = ' ' * 13


@dataclass(frozen=True)
class Plan:
    """A reconstruction before it is run.

    Attributes:
        steps: cost of an iteration of each unit, and iterations of each.
        images: calibration images that take part.
        boxes: prompt boxes on all of them.
        cache: bytes of the activation caches, at most.
        store: where they would lie; '' where there is no room.
        problem: what is missing and what to do, or ''.
    """

    steps: list[Step]
    images: int
    boxes: int
    cache: int
    store: str
    problem: str

    @property
    def iters(self) -> int:
        """Iterations of all units."""
        return sum(step.iters for step in self.steps)

    @property
    def peak(self) -> int:
        """Bytes of an iteration, at most."""
        return max((step.total.peak for step in self.steps), default=0)

    def kept(self, device: torch.device) -> int:
        """Bytes of the activation caches that lie in the memory of a device."""
        return self.cache if self.store == 'device' or (device.type, self.store) == ('cpu', 'host') else 0

    def seconds(self, machine: Machine, encoder: float, box: float) -> float:
        """Estimated time.

        Args:
            machine: its speed.
            encoder: seconds for one image.
            box: seconds for one box.
        """
        iterations = sum(step.iters * machine.seconds(step.total) for step in self.steps)
        # before and after the learning, the error of every unit on some images
        errors = 2 * min(ERROR_IMAGES, self.images)
        passes = STREAM_PASSES + QUANTIZED_COST * errors / self.images
        # of a forward and backward pass, the former takes a third
        path = sum(machine.seconds(step.path) for step in self.steps if step.path is not None) / 3
        return iterations + passes * (self.images * encoder + self.boxes * box) + path * (self.images + errors)


def plan_reconstruction(model: Any, recipe: QuantConfig, counts: Sequence[int], device: torch.device) -> Plan | None:
    """What the reconstruction of a recipe will cost.

    Args:
        model: detector-prompted SAM on the meta device, quantizers `off`.
        recipe: checked recipe.
        counts: prompt boxes on each calibration image.
        device: where the units will be optimised.

    Returns:
        None if the recipe has no reconstruction.

    Raises:
        ConfigError: an operator runs more than once in a forward pass.
    """
    settings = recipe.reconstruction
    if settings is None:
        return None
    most = min(recipe.calibration.max_boxes, settings.max_boxes, model.options.max_boxes)
    problem = '' if any(counts) else 'none of the calibration images has a prompt box; draw more images'
    # with no box at all the decoder could not be estimated
    counts = [min(count, most) for count in (counts if any(counts) else [most] * len(counts))]
    if follows_prompts(settings):
        counts = [count for count in counts if count]
    with torch.device('meta'):
        image = torch.empty(1, 3, model.sam.image_size, model.sam.image_size)
        samples = [Sample(image, torch.empty(count, 4)) for count in counts]
        steps = iteration_steps(model, model.sam, settings, samples)
        needed = cache_bytes(model, model.sam, settings, samples)
    store: str = settings.cache.store
    if store == 'auto':
        try:
            store = choose_store(needed, device, folder=Path.cwd())
        except ConfigError as error:
            store, problem = '', problem or str(error)
    return Plan(steps, len(samples), sum(counts), needed, store, problem)


def reconstruction_lines(recipe: QuantConfig, plan: Plan | None) -> list[str]:
    """Units, iterations, settings with what the preset gave them, and the activation cache."""
    if recipe.reconstruction is None or plan is None:
        return []
    settings, cache = recipe.reconstruction, recipe.reconstruction.cache
    told = {'preset', 'unit', 'iters', 'cache', *PARTS} | ({'loss', 'weight_lr'} if parts_differ(settings) else set())
    values = ', '.join(f'{name}={show(value)}' for name, value in settings if name not in told)
    store = plan.store or 'nowhere'
    if cache.store == 'auto':
        store += ' (auto)'
    return [
        *unit_lines(settings, plan.steps),
        *textwrap.wrap(values, 100, initial_indent=INDENT, subsequent_indent=INDENT),
        f'{INDENT}activation cache at most {plan.cache / 1e9:.2f} GB, {cache.dtype}, store {store}',
        *([f'missing: reconstruction: {plan.problem}'] if plan.problem else []),
    ]


def parts_differ(settings: Reconstruction) -> bool:
    """Whether encoder and decoder have settings of their own, or one is left out."""
    first, second = ((own.unit, own.iters, own.loss, own.weight_lr) for own in map(settings.of, PARTS))
    return first != second or len(settings.parts) < len(PARTS)


def unit_lines(settings: Reconstruction, steps: Sequence[Step]) -> list[str]:
    """How many units and iterations, part by part where they differ, and how many units the prompts teach."""
    total = sum(step.iters for step in steps)
    lines = []
    if parts_differ(settings):
        units = f'{len(steps)} units, {total} iterations in total'
        for part in PARTS:
            own, count = settings.of(part), sum(step.part == part for step in steps)
            what = (
                f'{count} units (unit={own.unit}), {own.iters} iterations each, loss={show(own.loss)}, '
                f'weight_lr={own.weight_lr:g}'
            )
            if part not in settings.parts:
                what = 'not reconstructed; weights rounded to nearest, scales as calibrated, if quantized'
            lines.append(f'{INDENT}{part}: {what}')
    else:
        own = settings.of('encoder')
        units = f'{len(steps)} units (unit={own.unit}), {own.iters} iterations each, {total} in total'
    if followed := sum(step.path is not None for step in steps):
        lines.append(
            f'{INDENT}prompt-aware: {followed} of {len(steps)} units learn from tokens behind the two-way transformer'
        )
    return [f'reconstruct  {units}; preset {settings.preset}', *lines]


def show(value: Any) -> str:
    """A setting as a recipe has it."""
    if isinstance(value, Part):
        return part_text(value)
    return str(value).lower() if isinstance(value, bool) else 'all' if value is None else str(value)


def duration(seconds: float) -> str:
    """Time in the unit that suits it."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
