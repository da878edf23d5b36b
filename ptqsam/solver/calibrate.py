"""Stage `calibrate`: draw images, let the observers see them, turn statistics into quantization parameters."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptqsam.config import QuantConfig
from ptqsam.distributed import own_block
from ptqsam.errors import ConfigError, GateError
from ptqsam.modules.walk import act_quantizers, quant_ops
from ptqsam.progress import progress, progress_bar
from ptqsam.quantizers import Quantizer
from ptqsam.solver.shared_calibration import SharedCalibration


def draw_images(
    names: Sequence[str], evaluated: Sequence[str], count: int, seed: int, first: bool = False
) -> list[int]:
    """Choose calibration images at random, without repetition, none of them an evaluated one.

    The released code takes the first images in annotation order; the papers say "randomly sampled", and so do we.

    Args:
        names: file names of the images to choose from.
        evaluated: file names of the evaluated split, all of it, so that evaluating a part changes no calibration.
        count: images to draw.
        seed: seed of the draw.
        first: draw nothing, take the first ones (defect D6). Default False.

    Returns:
        Sorted positions in ``names``.

    Raises:
        ConfigError: fewer images than wanted.
    """
    taboo = set(evaluated)
    pool = [position for position, name in enumerate(names) if name not in taboo]
    if count > len(pool):
        shared = len(names) - len(pool)
        reason = f' ({shared} more have the names of evaluated images; calibrate on the train split)' if shared else ''
        advice = f'; lower it with --quant-options calibration.num_images={len(pool)}' if pool else ''
        raise ConfigError(
            f'calibration.num_images: {count} wanted, but the calibration set has {len(pool)}{reason}{advice}'
        )
    if first:
        return pool[:count]
    return sorted(pool[index] for index in np.random.default_rng(seed).permutation(len(pool))[:count])


def check_calibration(recipe: QuantConfig, chunk_size: int) -> None:
    """Refuse a calibration in which an image would reach the observers of the decoder in several pieces.

    Args:
        recipe: checked recipe.
        chunk_size: boxes that the model decodes together.

    Raises:
        ConfigError: says so.
    """
    if recipe.calibration.max_boxes > chunk_size:
        raise ConfigError(
            f'calibration.max_boxes={recipe.calibration.max_boxes} is more than '
            f'model.test_cfg.chunk_size={chunk_size}: observers would see an image in pieces; make the two equal'
        )


def limit_boxes(data_sample: Any, max_boxes: int, rng: np.random.Generator) -> None:
    """Keep at most ``max_boxes`` prompt boxes of a data sample, drawn at random, in their order."""
    count = len(data_sample.proposals)
    if count > max_boxes:
        keep = np.sort(rng.permutation(count)[:max_boxes])
        data_sample.proposals = data_sample.proposals[torch.from_numpy(keep)]


def limited_batches(batches: Iterable[Any], max_boxes: int, seed: int) -> Iterator[Any]:
    """Data batches with the prompt boxes that calibration uses.

    Args:
        batches: data batches of one image each, prompt boxes attached.
        max_boxes: prompt boxes per image.
        seed: seed of the choice of boxes.
    """
    rng = np.random.default_rng(seed)
    for batch in batches:
        for data_sample in batch['data_samples']:
            limit_boxes(data_sample, max_boxes, rng)
        yield batch


def batches_with_boxes(batches: Iterable[Any], max_boxes: int, seed: int) -> Iterator[Any]:
    """`limited_batches` without those that have no box."""
    for batch in limited_batches(batches, max_boxes, seed):
        if any(len(data_sample.proposals) for data_sample in batch['data_samples']):
            yield batch


def own_batches(batches: Collection[Any], max_boxes: int, seed: int, what: str) -> Iterator[tuple[int, Any]]:
    """This process's share of the `limited_batches`, with a progress bar.

    A process also loads the images before its own, which costs little beside running them: so all draw the same boxes.

    Args:
        batches, max_boxes, seed: see there.
        what: the work, for the progress bar.

    Yields:
        Number of the batch among all, and the batch.
    """
    own = own_block(len(batches))
    with progress_bar(len(own), what, 'image') as bar:
        for number, batch in enumerate(limited_batches(islice(batches, own.stop), max_boxes, seed)):
            if number in own:
                yield number, batch
                bar.update()


@torch.no_grad()
def calibrate_activations(
    model: Any,
    target: nn.Module,
    batches: Collection[Any],
    max_boxes: int,
    seed: int,
    shared: SharedCalibration | None = None,
) -> None:
    """Observe activations of the float model and set the parameters of all activation quantizers.

    Locked quantizers keep theirs and quantize what the others observe. Of several processes, each runs its share of the
    images, and all get the statistics of all.

    Args:
        model: detector-prompted SAM with `test_step`.
        target: the part of it that holds the quantizers, all of them `off` but for locked ones.
        batches: data batches of one image each, prompt boxes attached.
        max_boxes: prompt boxes per image.
        seed: seed of the choice of boxes.
        shared: what other runs have found. Default None: everything is computed.

    Raises:
        GateError: a quantizer saw NaN or infinity (named with the image), or no data at all.
    """
    quantizers = [quantizer for quantizer in act_quantizers(target) if not quantizer.locked]
    for quantizer in act_quantizers(target):
        if quantizer.locked:
            quantizer.mode = 'quantize'
        else:
            quantizer.reset()
            quantizer.mode = 'observe'

    def observe() -> None:
        for number, batch in own_batches(batches, max_boxes, seed, 'calibrate'):
            for quantizer in quantizers:
                quantizer.observer.turn = number
            try:
                model.test_step(batch)
            finally:
                # also when the model itself refuses its output: this names the quantizer, too
                _check_finite(quantizers, batch['data_samples'][0])
        for quantizer in quantizers:
            quantizer.observer.synchronize()

    if shared is None:
        observe()
    else:
        shared.observe_once(quantizers, observe)
    for quantizer in progress(quantizers, 'search ranges', 'quantizer'):
        if shared is not None:
            shared.calibrate_once(quantizer)
        quantizer.mode = 'quantize'
        quantizer.observer.reset()  # frees its samples


@torch.no_grad()
def calibrate_weights(target: nn.Module, shared: SharedCalibration | None = None) -> None:
    """Observe all weights and set the parameters of their quantizers.

    Args:
        target: SAM with quant modules.
        shared: what other runs have found. Default None: everything is computed.
    """
    for _, op, quantizer in progress(list(quant_ops(target)), 'search weights', 'weight'):
        calibrate = partial(_calibrate_weight, quantizer, op.weight)
        quantizer.reset()
        if shared is not None:
            shared.calibrate_weight_once(quantizer, op.weight, calibrate)
        if not quantizer.calibrated:
            calibrate()
        quantizer.mode = 'quantize'


def _calibrate_weight(quantizer: Quantizer, weight: Tensor) -> None:
    quantizer.mode = 'observe'
    quantizer(weight)
    quantizer.mode = 'quantize'
    quantizer.observer.reset()  # it may hold a copy of the weight


def _check_finite(quantizers: list[Quantizer], data_sample: Any) -> None:
    """Find NaN and infinity in what was observed so far; one host sync for all quantizers together."""
    observed = [q for q in quantizers if q.observer.observed]
    extremes: list[Tensor] = [torch.stack([q.observer.min_val.sum(), q.observer.max_val.sum()]) for q in observed]
    if not extremes:
        return
    finite = torch.isfinite(torch.stack(extremes)).all(dim=1).tolist()
    for quantizer, good in zip(observed, finite, strict=True):
        if not good:
            raise GateError(
                f'{quantizer.path}: NaN or infinity in its input on image {data_sample.img_path}; '
                'check the checkpoint and the image'
            )
