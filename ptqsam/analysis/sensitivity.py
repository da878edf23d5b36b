"""Sensitivity of the masks to every quantizer: it alone on, and it alone off. AIMET's per-quantizer analysis.

Brute force is a forward pass of the whole model per quantizer, mode and image. Here a pass for a quantizer of the
decoder starts from the image embedding, and everywhere from the output of the block before the one that it is in
(`Prefix`), which does not depend on it; weights are quantized once (`Switches`). The scores are the same, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ptqsam.analysis.prefix import Prefix, place
from ptqsam.analysis.scores import Score, ScoreFile
from ptqsam.analysis.switches import Switches
from ptqsam.reconstruction.engine import Sample
from ptqsam.reconstruction.units import Segment, find_segments
from ptqsam.solver.rules import RuleBook

# 'enabled': the quantizer alone is on; 'disabled': it alone is off
Mode = Literal['enabled', 'disabled']
# in the place of a path: no quantizer is switched, so all are off ('enabled') or on ('disabled')
NOBODY = '*'
ENCODER = 'image_encoder.'


@dataclass
class Subject:
    """A calibrated model whose quantizers are examined.

    Attributes:
        model: detector-prompted SAM with `encode` and `decode_logits`, which decode once.
        switches: of its quantizers, all of them calibrated.
        rules: rules and what they decided.
        name: distinguishes the scores of models with other bits.
        segments: chains of the encoder and of the decoder, found when first needed.
    """

    model: Any
    switches: Switches
    rules: RuleBook
    name: str
    segments: list[list[Segment]] = field(default_factory=list)

    @torch.no_grad()
    def find_segments(self, sample: Sample) -> None:
        """Find the chains, by running the model on an image."""
        if self.segments:
            return
        embeddings: list[Tensor] = []
        self.segments = find_segments(
            self.model.sam,
            'block',
            [
                lambda: embeddings.append(self.model.encode(sample.image)),
                lambda: self.model.decode_logits(embeddings[0], sample.boxes),
            ],
        )


@torch.no_grad()
def reference_logits(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """Mask logits of a model as it is, per image, (N, H, W)."""
    return [model.decode_logits(model.encode(sample.image), sample.boxes)[0] for sample in samples]


def key(name: str, mode: Mode, image: int, path: str) -> str:
    """Name of a score: of a subject, a mode, the number of an image, a quantizer or `NOBODY`."""
    return f'{name} {mode} {image} {path}'


def total(scores: ScoreFile, name: str, mode: Mode, images: int, path: str) -> Score | None:
    """Score of a quantizer over the images that were measured so far; None if there are none."""
    keys = [key(name, mode, image, path) for image in range(images)]
    found = [scores[each] for each in keys if each in scores]
    return Score.total(found) if found else None


def missing(
    scores: ScoreFile, name: str, modes: Sequence[Mode], images: int, paths: Sequence[str]
) -> list[tuple[Mode, int, list[str]]]:
    """What is still to be measured of a subject: mode, image and paths, image after image."""
    wanted = []
    for image in range(images):
        for mode in modes:
            names = [path for path in (NOBODY, *paths) if key(name, mode, image, path) not in scores]
            if names:
                wanted.append((mode, image, names))
    return wanted


def measure(
    subject: Subject,
    mode: Mode,
    image: int,
    sample: Sample,
    reference: Tensor,
    paths: Sequence[str],
    scores: ScoreFile,
    done: Callable[[], object],
) -> None:
    """Score quantizers on an image.

    Args:
        subject: the model.
        mode: whether each is the only one on, or the only one off.
        image: its number.
        sample: the image and its boxes.
        reference: logits of the float model.
        paths: of the quantizers, or `NOBODY`.
        scores: gets the results.
        done: called after every one.
    """
    model, switches, on = subject.model, subject.switches, mode == 'enabled'

    def keep(path: str, logits: Tensor) -> None:
        scores.add(key(subject.name, mode, image, path), Score.of(reference, logits))
        done()

    def logits_of(embedding: Tensor) -> Tensor:
        return model.decode_logits(embedding, sample.boxes)[0]

    switches.turn_all(on=not on)
    subject.find_segments(sample)
    encoder, decoder = subject.segments
    with torch.no_grad():
        embedding = model.encode(sample.image)
        if NOBODY in paths:
            keep(NOBODY, logits_of(embedding))
        prefix = Prefix(partial(model.encode, sample.image), encoder)
        for path in in_turn([path for path in paths if path.startswith(ENCODER)], prefix):
            with switches.turned(path, on):
                logits = logits_of(prefix.run())
            keep(path, logits)
        prefix = Prefix(partial(model.decode_logits, embedding, sample.boxes), decoder)
        for path in in_turn([path for path in paths if path != NOBODY and not path.startswith(ENCODER)], prefix):
            with switches.turned(path, on):
                logits = prefix.run()[0]
            keep(path, logits)


def in_turn(paths: Sequence[str], prefix: Prefix) -> Iterator[str]:
    """Quantizers in the order of their segments, the prefix standing at the segment of each."""
    places = {path: place(path, prefix.segments) for path in paths}
    position = 0
    for path in sorted(paths, key=places.__getitem__):
        while position < places[path]:
            prefix.advance()
            position += 1
        yield path
