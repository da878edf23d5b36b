"""Stage `calibrate`: draw images, let the observers see them, turn statistics into quantization parameters."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptqsam.errors import ConfigError, GateError
from ptqsam.progress import progress
from ptqsam.quantizers import Quantizer
from ptqsam.solver.prepare import act_quantizers, quant_ops


def draw_images(size: int, count: int, seed: int) -> list[int]:
    """Choose calibration images at random, without repetition.

    The released code takes the first images in annotation order; the papers say "randomly sampled", and so do we.

    Args:
        size: images in the calibration dataset.
        count: images to draw.
        seed: seed of the draw.

    Returns:
        Sorted indices.

    Raises:
        ConfigError: more images wanted than there are.
    """
    if count > size:
        raise ConfigError(
            f'calibration.num_images: {count} wanted, but the calibration set has {size}; lower it with '
            f'--quant-options calibration.num_images={size}'
        )
    return sorted(np.random.default_rng(seed).permutation(size)[:count].tolist())


def check_no_overlap(calibration: Sequence[Any], evaluation: Sequence[Any]) -> None:
    """Refuse to calibrate on images that are evaluated.

    Args:
        calibration: names of the calibration images.
        evaluation: names of the evaluated images.

    Raises:
        ConfigError: with the number of shared images and one of them.
    """
    shared = sorted(set(calibration) & set(evaluation), key=str)
    if shared:
        raise ConfigError(
            f'calib_dataset: {len(shared)} calibration images are evaluated as well, for example {shared[0]}; '
            'calibrate on the train split'
        )


def limit_boxes(data_sample: Any, max_boxes: int, rng: np.random.Generator) -> None:
    """Keep at most ``max_boxes`` prompt boxes of a data sample, drawn at random, in their order."""
    count = len(data_sample.proposals)
    if count > max_boxes:
        keep = np.sort(rng.permutation(count)[:max_boxes])
        data_sample.proposals = data_sample.proposals[torch.from_numpy(keep)]


@torch.no_grad()
def calibrate_activations(model: Any, target: nn.Module, batches: Iterable[Any], max_boxes: int, seed: int) -> None:
    """Observe activations of the float model and set the parameters of all activation quantizers.

    Args:
        model: detector-prompted SAM with `test_step`.
        target: the part of it that holds the quantizers, all of them `off`.
        batches: data batches of one image each, prompt boxes attached.
        max_boxes: prompt boxes per image.
        seed: seed of the choice of boxes.

    Raises:
        GateError: a quantizer saw NaN or infinity (named with the image), or no data at all.
    """
    quantizers = act_quantizers(target)
    for quantizer in quantizers:
        quantizer.mode = 'observe'
    rng = np.random.default_rng(seed)
    for batch in progress(batches, 'calibrate', 'image'):
        for data_sample in batch['data_samples']:
            limit_boxes(data_sample, max_boxes, rng)
        model.test_step(batch)
        _check_finite(quantizers, batch['data_samples'][0])
    for quantizer in progress(quantizers, 'search ranges', 'quantizer'):
        quantizer.mode = 'quantize'


@torch.no_grad()
def calibrate_weights(target: nn.Module) -> None:
    """Observe all weights and set the parameters of their quantizers."""
    for _, op, quantizer in progress(list(quant_ops(target)), 'search weights', 'weight'):
        quantizer.mode = 'observe'
        quantizer(op.weight)
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
