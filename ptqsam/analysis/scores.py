"""How far mask logits are from those of the float model, and a file that keeps what is measured."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ptqsam.evaluation.quantization_error import error_from_sums, error_sums
from ptqsam.fileio import write_json

# seconds between two writes of the file: what a kill can lose
PERIOD = 20.0


class Score(NamedTuple):
    """Sums over the masks of one or several images.

    Attributes:
        signal: of squared float logits.
        noise: of squared differences.
        iou: of the IoUs of the masks (logits > 0) with those of the float model.
        masks: their number.
    """

    signal: float
    noise: float
    iou: float
    masks: int

    @classmethod
    def of(cls, reference: Tensor, logits: Tensor) -> Self:
        """Compare logits (N, H, W) with those of the float model."""
        sums = error_sums(reference, logits)
        truth, masks = (reference > 0).flatten(1), (logits > 0).flatten(1)
        common, either = (truth & masks).sum(1), (truth | masks).sum(1)
        # two empty masks are the same
        iou = torch.where(either > 0, common / either.clamp(min=1), 1.0).sum()
        signal, noise, total = torch.stack([sums[0], sums[1], iou.double()]).tolist()
        return cls(signal, noise, total, len(reference))

    @classmethod
    def total(cls, scores: Iterable[Self]) -> Self:
        """Of several images together."""
        return cls(*(sum(column) for column in zip(*scores, strict=True)))

    @property
    def sqnr(self) -> float:
        """Signal to noise ratio in dB; infinite for equal logits."""
        return error_from_sums(torch.tensor([self.signal, self.noise, 0.0, 0.0])).sqnr

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the masks."""
        return self.iou / self.masks


class ScoreFile:
    """Scores by name, in a JSON file that is complete at any time; each conditions have a file of their own.

    Args:
        folder: of the file.
        conditions: fingerprint of what the scores depend on.
    """

    def __init__(self, folder: Path, conditions: str) -> None:
        self.path = path = folder / f'scores-{conditions[:12]}.json'
        self.conditions = conditions
        self.scores: dict[str, Score] = {}
        self._written = time.monotonic()
        try:
            earlier = json.loads(path.read_text(encoding='utf-8'))
            if earlier['conditions'] == conditions:
                self.scores = {name: Score(*values) for name, values in earlier['scores'].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # there is none, or it is of no use

    def __contains__(self, name: str) -> bool:
        return name in self.scores

    def __getitem__(self, name: str) -> Score:
        return self.scores[name]

    def add(self, name: str, score: Score) -> None:
        """Keep a score, and write the file from time to time."""
        self.scores[name] = score
        if time.monotonic() - self._written > PERIOD:
            self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, dict(conditions=self.conditions, scores=self.scores), indent=None)
        self._written = time.monotonic()
