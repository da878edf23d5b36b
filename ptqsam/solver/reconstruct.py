"""Stage `reconstruct`: what the loop has to do around the reconstruction engine; the calibrated model on disk."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptqsam.config import QuantConfig
from ptqsam.errors import ConfigError
from ptqsam.fileio import atomic_path, fingerprint
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.progress import progress
from ptqsam.reconstruction.cache import ActivationCache, choose_store
from ptqsam.reconstruction.engine import Reconstructor, Sample
from ptqsam.reconstruction.footprint import cache_bytes
from ptqsam.reconstruction.losses import is_prompt_aware, make_loss
from ptqsam.solver.calibrate import limit_boxes

CALIBRATED = 'calibrated.safetensors'


@dataclass(frozen=True)
class ReconstructionStage:
    """The reconstruction of a run.

    Attributes:
        recipe: with `reconstruction`.
        folder: where the calibrated model and finished units are kept.
        origin: what the result depends on; files of another origin are refused.
    """

    recipe: QuantConfig
    folder: Path
    origin: dict[str, Any]

    def clear(self) -> None:
        """Remove what an earlier run left."""
        for path in self.folder.glob('*.safetensors'):
            path.unlink()

    def save_calibrated(self, target: nn.Module) -> None:
        """Keep the calibrated model, so that a resumed run starts from the same to the last bit."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in target.state_dict().items()}
        with atomic_path(self.folder / CALIBRATED) as temporary:
            # clones: parameters may share memory, which the format refuses
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, self._facts())

    def load_calibrated(self, target: nn.Module) -> bool:
        """Take the calibrated model of an earlier run, if there is one.

        Args:
            target: SAM with quant modules, changed in place.

        Returns:
            Whether there was one.

        Raises:
            ConfigError: it was made under other conditions.
        """
        for unfinished in self.folder.glob('.*.safetensors'):  # a kill interrupted its writing
            unfinished.unlink()
        path = self.folder / CALIBRATED
        try:
            with safe_open(path, 'pt') as file:
                facts = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return False
        if differing := [key for key, value in self._facts().items() if facts.get(key) != value]:
            raise ConfigError(
                f'--resume: {path} differs from this run in {", ".join(differing)}; run without --resume or with '
                'another --work-dir'
            )
        device = next(target.parameters()).device
        target.load_state_dict(tensors)
        target.to(device)  # the scales of fresh quantizers are made on the CPU
        for quantizer in quantizers(target):
            quantizer.mode = 'quantize'
        return True

    def _facts(self) -> dict[str, str]:
        return {key: str(value) for key, value in self.origin.items()}

    def run(self, model: Any, target: nn.Module, batches: Iterable[Any], call_hook: Any) -> Reconstructor:
        """Reconstruct all units.

        Args:
            model: detector-prompted SAM.
            target: the SAM in it, calibrated; changed in place.
            batches: calibration images, one per batch.
            call_hook: calls a stage's solver hooks by name.

        Returns:
            The engine, with outcomes and errors of weights.

        Raises:
            ConfigError: no prompts, or no room for activations.
        """
        for quantizer in act_quantizers(target):
            if quantizer.ch_axis is not None and quantizer.ch_axis >= 0:
                raise ConfigError(
                    f'{quantizer.path}: ch_axis is {quantizer.ch_axis}, but reconstruction draws positions, which '
                    'changes the axes before the channels; count it from the end'
                )
        with first_pass(model):
            return self._run(model, target, draw_samples(model, batches, self.recipe), call_hook)

    def _run(self, model: Any, target: nn.Module, samples: list[Sample], call_hook: Any) -> Reconstructor:
        assert self.recipe.reconstruction is not None
        settings = self.recipe.reconstruction.cache
        device = samples[0].image.device
        store = settings.store
        if store == 'auto':
            for quantizer in quantizers(target):
                quantizer.mode = 'off'
            needed = cache_bytes(model, target, self.recipe.reconstruction, samples)
            store = choose_store(needed, device, folder=self.folder)
        new_cache = partial(ActivationCache, store, device, getattr(torch, settings.dtype), self.folder)
        engine = Reconstructor(
            model, target, self.recipe, samples, new_cache, self.folder, fingerprint(self.origin), call_hook
        )
        engine.run()
        return engine


@contextmanager
def first_pass(model: Any) -> Iterator[None]:
    """Let a model with a cascade decode once: a unit that runs several times has no one input to learn from."""
    options = model.options
    model.options = replace(options, cascade=0)
    try:
        yield
    finally:
        model.options = options


def check_reconstruction(recipe: QuantConfig) -> None:
    """Refuse a reconstruction that cannot work, before the work of the calibration.

    Args:
        recipe: checked recipe, with or without `reconstruction`.

    Raises:
        ConfigError: the loss cannot be built or does not suit the units.
    """
    if recipe.reconstruction is None:
        return
    for part in recipe.reconstruction.parts:
        settings = recipe.reconstruction.of(part)
        make_loss(settings)  # refuses what cannot be built
        if is_prompt_aware(settings.loss) and settings.unit not in ('block', 'stage'):
            raise ConfigError(
                f'reconstruction: {settings.loss.type} follows whole blocks and stages to the prompts, but the unit of '
                f'the {part} is {settings.unit}; set reconstruction.unit (or reconstruction.{part}.unit) to block or '
                f'stage, or reconstruction.{part}.loss.type=SquaredError'
            )


def draw_samples(model: Any, batches: Iterable[Any], recipe: QuantConfig) -> list[Sample]:
    """Images and prompts of reconstruction: those of the calibration, with fewer boxes.

    Args:
        model: detector-prompted SAM.
        batches: calibration images, one per batch.
        recipe: with `reconstruction`.
    """
    assert recipe.reconstruction is not None
    calibration = recipe.calibration
    rng, fewer = np.random.default_rng(calibration.seed), np.random.default_rng([calibration.seed, 1])
    samples = []
    for batch in progress(batches, 'load images', 'image'):
        for data_sample in batch['data_samples']:
            limit_boxes(data_sample, calibration.max_boxes, rng)
            limit_boxes(data_sample, recipe.reconstruction.max_boxes, fewer)
        samples += [Sample(image, boxes) for image, boxes in model.sam_inputs(batch)]
    return samples
