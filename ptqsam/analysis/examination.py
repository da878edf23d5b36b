"""Examine all quantizers: the recipe's own bits first, alone on and alone off, then other bits, alone on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ptqsam.analysis.cases import OWN
from ptqsam.analysis.scores import Score, ScoreFile
from ptqsam.analysis.sensitivity import NOBODY, Mode, Subject, measure, missing, total
from ptqsam.analysis.tables import Sensitivity, write_sensitivities
from ptqsam.analysis.watch import Size
from ptqsam.errors import GateError
from ptqsam.progress import progress_bar
from ptqsam.reconstruction.engine import Sample
from ptqsam.solver.rules import Choice

# dB; hooks that change weights without changing what the model computes leave more than 100
FLOAT_SQNR = 60.0


@dataclass(frozen=True)
class Plan:
    """What is done with one calibrated model.

    Attributes:
        bits: bit width of all quantizers; None: those of the recipe.
        modes: how its quantizers are examined.
        paths: which.
    """

    bits: int | None
    modes: tuple[Mode, ...]
    paths: list[str]

    @property
    def name(self) -> str:
        """Name of the model in the names of scores."""
        return OWN if self.bits is None else str(self.bits)


@dataclass
class Examination:
    """All of it.

    Attributes:
        choices: what the rules decided for the points to examine.
        bits: other bit widths.
        samples: images and boxes.
        references: mask logits of the float model, per image.
        sizes: path -> what the quantizer handles.
        scores: kept on disk.
        table: CSV file, written whenever an image is done.
    """

    choices: Sequence[Choice]
    bits: Sequence[int]
    samples: Sequence[Sample]
    references: Sequence[Tensor]
    sizes: dict[str, Size]
    scores: ScoreFile
    table: Path

    def plans(self) -> list[Plan]:
        """The models to make; widths that a quantizer has in the recipe are not measured twice."""
        plans = [Plan(None, ('enabled', 'disabled'), [choice.point.path for choice in self.choices])]
        for bits in sorted(set(self.bits)):
            if paths := [choice.point.path for choice in self.choices if choice.bits != bits]:
                plans.append(Plan(bits, ('enabled',), paths))
        return plans

    def run(self, subject_at: Callable[[int | None], AbstractContextManager[Subject]]) -> None:
        """Measure what is missing.

        Args:
            subject_at: bits, None for the recipe's -> the calibrated model, which is needed no longer afterwards.

        Raises:
            GateError: a model does not compute what the float one does while its quantizers are off.
        """
        todo = [
            (plan, missing(self.scores, plan.name, plan.modes, len(self.samples), plan.paths)) for plan in self.plans()
        ]
        runs = sum(len(paths) for _, wanted in todo for _, _, paths in wanted)
        try:
            with progress_bar(runs, 'sensitivity', 'run') as bar:
                for plan, wanted in todo:
                    if not wanted:
                        continue
                    with subject_at(plan.bits) as subject:
                        for mode, image, paths in wanted:
                            measure(
                                subject,
                                mode,
                                image,
                                self.samples[image],
                                self.references[image],
                                paths,
                                self.scores,
                                bar.update,
                            )
                            self.check(plan)
                            write_sensitivities(self.table, self.rows())
        finally:
            self.scores.save()
        write_sensitivities(self.table, self.rows())

    def check(self, plan: Plan) -> None:
        """Refuse a model that is not the float one while its quantizers are off."""
        score = self.score(plan.name, 'enabled', NOBODY)
        if score is not None and not score.sqnr > FLOAT_SQNR:
            raise GateError(
                f'with all quantizers off, mask logits have {score.sqnr:.1f} dB against the float model; calibrating '
                'once more has not led to the weights of the checkpoint, was it made with other images or threads?'
            )

    def score(self, name: str, mode: Mode, path: str) -> Score | None:
        """Score over the images measured so far."""
        return total(self.scores, name, mode, len(self.samples), path)

    @property
    def everything(self) -> Score | None:
        """Masks when all quantizers are on."""
        return self.score(OWN, 'disabled', NOBODY)

    def rows(self) -> list[Sensitivity]:
        """Rows of the table, quantizer by quantizer, by bits."""
        rows = []
        for choice in self.choices:
            path = choice.point.path
            for bits in sorted({choice.bits, *self.bits}):
                own = bits == choice.bits
                enabled = self.score(OWN if own else str(bits), 'enabled', path)
                disabled = self.score(OWN, 'disabled', path) if own else None
                rows.append(Sensitivity(choice.point, bits, own, self.sizes[path], enabled, disabled))
        return rows
