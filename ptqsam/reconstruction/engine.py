"""All units, one after the other: stream activations to a unit, reconstruct it, commit it to disk."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ptqsam.config import PartName, QuantConfig, Reconstruction
from ptqsam.errors import ConfigError
from ptqsam.evaluation.quantization_error import QuantizationError, error_from_sums, error_sums
from ptqsam.fileio import atomic_path
from ptqsam.modules.walk import act_quantizers, original_weights, quantizers, weight_quantizers
from ptqsam.modules.watch import captured, returned
from ptqsam.progress import progress_bar
from ptqsam.quantizers import Quantizer
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.losses import follows_prompts
from ptqsam.reconstruction.optimise import Optimiser, Outcome, UnitData, reset_drop_prob
from ptqsam.reconstruction.prompts import PromptPath
from ptqsam.reconstruction.sampling import Draw
from ptqsam.reconstruction.streams import Arguments, Stream
from ptqsam.reconstruction.units import Segment, Unit, find_parts


@dataclass(frozen=True)
class Sample:
    """What SAM is given for a calibration image.

    Attributes:
        image: (1, 3, S, S), preprocessed.
        boxes: (N, 4), corners in pixels of the resized image; N may be 0.
    """

    image: Tensor
    boxes: Tensor


class Reconstructor:
    """Reconstructs the units of a calibrated SAM.

    Args:
        model: detector-prompted SAM with `encode` and `decode_logits`.
        target: the SAM in it, all quantizers calibrated.
        recipe: with `reconstruction`.
        samples: calibration images and their prompts.
        new_cache: makes an empty activation cache.
        folder: finished units are kept here, one file each.
        origin: fingerprint of everything that the result depends on.
        call_hook: calls the solver hooks `before_unit`, `after_unit_iter` and `after_unit`.
    """

    def __init__(
        self,
        model: Any,
        target: nn.Module,
        recipe: QuantConfig,
        samples: Sequence[Sample],
        new_cache: Callable[[], ActivationCache],
        folder: Path,
        origin: str,
        call_hook: Callable[..., None],
    ) -> None:
        if recipe.reconstruction is None:
            raise ConfigError('reconstruction: the recipe has no such section')
        self.model = model
        self.target = target
        self.recipe = recipe
        self.settings: Reconstruction = recipe.reconstruction
        self.with_boxes = [sample for sample in samples if len(sample.boxes)]
        if not self.with_boxes:
            raise ConfigError('reconstruction: none of the calibration images has a prompt box; draw more images')
        # what prompts make of an image shows where there are some
        self.samples = self.with_boxes if follows_prompts(self.settings) else samples
        self.new_cache = new_cache
        self.folder = folder
        self.origin = origin
        self.call_hook = call_hook
        self.outcomes: dict[str, Outcome] = {}
        self.errors: dict[str, QuantizationError] = {}

    def run(self) -> None:
        """Reconstruct all units; afterwards `outcomes` and `errors` (of weights) are filled, all quantizers are on."""
        for quantizer in quantizers(self.target):
            quantizer.mode = 'off'
        parts = self.find_parts()
        units = [unit for part in parts.values() for segment in part for unit in segment.units]
        if not units:
            raise ConfigError(
                'reconstruction: no weight is quantized, so there is nothing to learn; leave the section out, or '
                'enable weights with a rule'
            )
        self.numbers = {unit: number for number, unit in enumerate(units)}
        own = {part: self.settings.of(part) for part in parts}
        self.of_unit = {unit: own[part] for part in parts for segment in parts[part] for unit in segment.units}
        total = sum(settings.iters for settings in self.of_unit.values())
        with progress_bar(total, 'reconstruct', 'iteration') as self.bar:
            encoders = [partial(self.model.encode, sample.image) for sample in self.samples]
            # with one stream, the float model is given what the quantized one makes of the stages before
            plain_encoders = None if self.settings.drift_correction else encoders
            plain, quantized = self.run_part(parts['encoder'], plain_encoders, encoders, self.follow_encoder)
            decoders = (self.decoders(plain), self.decoders(quantized))
            if parts['decoder']:
                self.run_part(parts['decoder'], *decoders, partial(self.follow_decoder, quantized))
        for quantizer in quantizers(self.target):
            quantizer.mode = 'quantize'

    def decoders(self, embeddings: Sequence[Tensor]) -> list[Callable[[], Any]]:
        """Forwards of the decoder, for the images that have boxes."""
        return [
            partial(self.model.decode_logits, embedding, sample.boxes)
            for embedding, sample in zip(embeddings, self.samples, strict=True)
            if len(sample.boxes)
        ]

    def follow_encoder(self, index: int, draw: Draw) -> Any:
        """Run the model on an image and all of its boxes."""
        sample = self.samples[index]
        return self.model.decode_logits(self.model.encode(sample.image), sample.boxes)

    def follow_decoder(self, embeddings: Sequence[Tensor], index: int, draw: Draw) -> Any:
        """Run the decoder on an image and the boxes that were drawn."""
        (boxes,) = draw.inputs((self.samples[index].boxes,))
        return self.model.decode_logits(embeddings[index], boxes)

    @torch.no_grad()
    def find_parts(self) -> dict[PartName, list[Segment]]:
        """Segments of the encoder and of the decoder."""
        sample = self.with_boxes[0]
        embeddings: list[Tensor] = []
        return find_parts(
            self.target,
            self.settings,
            [
                lambda: embeddings.append(self.model.encode(sample.image)),
                lambda: self.model.decode_logits(embeddings[0], sample.boxes),
            ],
        )

    def run_part(
        self,
        segments: Sequence[Segment],
        plain_forwards: Sequence[Callable[[], Any]] | None,
        quantized_forwards: Sequence[Callable[[], Any]],
        follow: Callable[[int, Draw], Any],
    ) -> tuple[list[Any], list[Any]]:
        """Reconstruct a chain of segments.

        Args:
            segments: in the order of execution.
            plain_forwards: one per image, with what the float model gives; None: the quantized model feeds the float
                segments, too (drift correction).
            quantized_forwards: one per image, with what the quantized model gives.
            follow: runs the model on an image to its masks, for units that are followed to their prompted tokens.

        Returns:
            What the forwards return in the float and in the quantized model, per image.
        """
        with torch.no_grad():
            if not segments:
                with original_weights(self.target):
                    plain_results = [forward() for forward in plain_forwards or ()]
                quantized_results = [forward() for forward in quantized_forwards]
                return plain_results or quantized_results, quantized_results
            quantized = Stream(quantized_forwards, segments, self.new_cache)
            plain = quantized
            if plain_forwards is not None:
                with original_weights(self.target):
                    plain = Stream(plain_forwards, segments, self.new_cache)
        results: tuple[list[Any], list[Any]] = ([], [])
        for segment in segments:
            results = self.run_segment(segment, plain, quantized, follow)
        return results

    def run_segment(
        self, segment: Segment, plain: Stream, quantized: Stream, follow: Callable[[int, Draw], Any]
    ) -> tuple[list[Any], list[Any]]:
        """Reconstruct the units of a segment and bring both streams behind it.

        Args:
            segment: the current one of both streams.
            plain: stream of the float model; with drift correction the other one.
            quantized: stream of the quantized model, everything before the segment hardened.
            follow: as in `run_part`.

        Returns:
            What the forwards return in the float and in the quantized model, per image; empty before the last segment.
        """
        open_units = [unit for unit in segment.units if not self.restorable(unit)]
        data = {unit: UnitData(self.new_cache, self.path_of(unit, quantized, follow)) for unit in open_units}
        # no weight of the segment is hard yet: with its quantizers off, and without what hooks made of its weights, it
        # is the float model; so is what lies between it and the next one
        self.switch(segment, on=False)
        with original_weights(self.target):
            if plain is not quantized:
                plain_results = plain.advance(partial(self.record, plain, data))
            elif data:
                for index in range(len(plain.forwards)):
                    self.record(plain, data, index)
        self.switch(segment, on=True)
        for unit in segment.units:
            before = {path: op.weight if op.original is None else op.original for path, op in unit.ops.items()}
            if unit in data:
                self.reconstruct(unit, data.pop(unit), quantized)
            else:
                self.restore(unit)
            for path, op in unit.ops.items():
                self.errors[cast(Quantizer, op.weight_quantizer).path] = error_from_sums(
                    error_sums(before[path], op.weight)
                )
                op.original = None  # nothing is compared with it any more
        torch.manual_seed(self.seed_of(segment))
        results = quantized.advance(quantized.run)
        return results if plain is quantized else plain_results, results

    def path_of(self, unit: Unit, stream: Stream, follow: Callable[[int, Draw], Any]) -> PromptPath | None:
        """How a unit is followed to its prompted tokens, if it is."""
        return None if unit.followed_to is None else PromptPath(self.target, stream, follow, unit)

    def switch(self, segment: Segment, on: bool) -> None:
        """Turn the quantizers of a segment on or off; those of activations only where they take part."""
        for module in segment.modules.values():
            for quantizer in weight_quantizers(module):
                quantizer.mode = 'quantize' if on else 'off'
            for quantizer in act_quantizers(module):
                quantizer.mode = 'quantize' if on and self.settings.activations else 'off'

    def record(self, stream: Stream, data: dict[Unit, UnitData], index: int) -> Any:
        """Run a segment of the float model on an image and keep inputs and outputs of its units.

        Args:
            stream: of the float model; the segment is its current one, with all quantizers off.
            data: unit -> activations, to which one entry is added; units that are taken from files are left out.
            index: number of the image.

        Returns:
            Output of the segment.
        """
        with ExitStack() as stack:
            inputs = {unit: stack.enter_context(captured(unit.first)) for unit in data}
            outputs = {unit: stack.enter_context(returned(unit.last)) for unit in data}
            result = stream.run(index)
        for unit, entry in data.items():
            entry.add_plain(Arguments.of(inputs[unit][0]), tree_leaves(outputs[unit][0]))
        return result

    def reconstruct(self, unit: Unit, data: UnitData, stream: Stream) -> None:
        """Reconstruct a unit and commit it.

        Args:
            unit: of the current segment; the units before it are hard.
            data: its activations in the float model; freed afterwards.
            stream: of the quantized model.
        """
        self.bar.set_postfix_str(unit.name)
        self.call_hook('before_unit', unit=unit)
        seed = self.seed_of(unit)
        torch.manual_seed(seed)  # with a compat switch the units before this one still drop at random
        for index in range(len(stream.forwards)):
            data.add_quantized(stream.run_until(unit, index))
        optimiser = Optimiser(unit, data, self.of_unit[unit], self.recipe.compat, seed)
        outcome = optimiser.run(partial(self.after_iteration, unit))
        data.clear()
        self.commit(unit, outcome)
        self.outcomes[unit.name] = outcome
        self.call_hook('after_unit', unit=unit, outcome=outcome)

    def after_iteration(self, unit: Unit, step: int, loss: Tensor) -> None:
        """Count an iteration."""
        self.bar.update()
        self.call_hook('after_unit_iter', unit=unit, step=step, loss=loss)

    def seed_of(self, unit: Unit) -> int:
        """Seed of a unit or segment, whatever was reconstructed before it."""
        text = f'{self.recipe.calibration.seed}/{unit.name}'
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], 'little')

    def commit_path(self, unit: Unit) -> Path:
        """File of a finished unit."""
        return self.folder / f'{self.numbers[unit]:03d}.safetensors'

    def commit(self, unit: Unit, outcome: Outcome) -> None:
        """Write weights and quantizers of a finished unit; the file appears at once or not at all."""
        tensors: dict[str, Tensor] = {f'{path}.weight': op.weight for path, op in unit.ops.items()}
        for quantizer in unit.act_quantizers:
            tensors |= {f'{quantizer.path}.{name}': value for name, value in quantizer.state_dict().items()}
        facts = {name: value for name, value in asdict(outcome).items() if name != 'losses'}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self.commit_path(unit)) as temporary:
            save_file(
                tensors | {'losses': outcome.losses.cpu()},
                temporary,
                dict(unit=unit.name, origin=self.origin, outcome=json.dumps(facts)),
            )

    def restorable(self, unit: Unit) -> bool:
        """Whether an earlier run under the same conditions finished a unit; a damaged file counts as none."""
        path = self.commit_path(unit)
        if not path.is_file():
            return False
        try:
            with safe_open(path, 'pt') as file:
                facts = file.metadata() or {}
        except SafetensorError:
            return False
        return facts.get('unit') == unit.name and facts.get('origin') == self.origin

    @torch.no_grad()
    def restore(self, unit: Unit) -> None:
        """Take weights, quantizers and outcome of a finished unit from its file, as `commit` wrote them."""
        with safe_open(self.commit_path(unit), 'pt') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()['outcome'])
        for path, op in unit.ops.items():
            op.weight = nn.Parameter(tensors[f'{path}.weight'].to(op.weight.device), requires_grad=False)
            op.frozen = True
        for quantizer in unit.act_quantizers:
            names = quantizer.state_dict()
            quantizer.load_state_dict({name: tensors[f'{quantizer.path}.{name}'] for name in names})
        reset_drop_prob(unit, self.settings, self.recipe.compat)
        self.outcomes[unit.name] = Outcome(**facts, losses=tensors['losses'])
        self.bar.update(self.of_unit[unit].iters)


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """What reconstruction did to each finished unit, from the files that `Reconstructor.commit` wrote.

    Args:
        folder: where they lie.

    Returns:
        Unit -> outcome, in the order of execution.
    """
    outcomes = {}
    for path in sorted(folder.glob('[0-9]*.safetensors')):
        with safe_open(path, 'pt') as file:
            facts = file.metadata()
            outcomes[facts['unit']] = Outcome(**json.loads(facts['outcome']), losses=file.get_tensor('losses'))
    return outcomes
