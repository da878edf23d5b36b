"""An analysis from its arguments to its files."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ptqsam.analysis.cases import OWN, Case, at_bits
from ptqsam.analysis.description import describe
from ptqsam.analysis.examination import Examination
from ptqsam.analysis.scores import ScoreFile
from ptqsam.analysis.sensitivity import Subject, reference_logits
from ptqsam.analysis.statistics import Statistics
from ptqsam.analysis.tables import worst_table
from ptqsam.analysis.watch import measure_sizes
from ptqsam.checkpoint import read_manifest
from ptqsam.cli import cache_folder, load_model_config, recipe_name
from ptqsam.config import QuantConfig
from ptqsam.fileio import fingerprint, write_json
from ptqsam.report.sensitivity import plot_roles, plot_sensitivities
from ptqsam.report.statistics import plot_histograms, plot_statistics
from ptqsam.report.summary import run_label
from ptqsam.solver.reconstruct import first_pass
from ptqsam.solver.rules import select_points

SUMMARY = 'analysis.json'
FILES = {
    'sensitivity': ('sensitivity.csv', 'sensitivity.png', 'roles.png'),
    'statistics': ('statistics.csv', 'statistics.png', 'histograms.json', 'histograms.png', 'channel_groups.json'),
}


class Analysis:
    """Examines the quantizers of a recipe.

    Args:
        args: command line.
        recipe: checked recipe.
        packed: packed checkpoint of it; None: it is calibrated.
        folder: results go here.
        temporary: empty folder for what the loop leaves.
    """

    def __init__(
        self, args: argparse.Namespace, recipe: QuantConfig, packed: Path | None, folder: Path, temporary: Path
    ) -> None:
        self.args = args
        self.recipe = recipe
        self.packed = packed
        self.folder = folder
        self.temporary = temporary
        self.examination: Examination | None = None

    def run(self) -> dict[str, Any]:
        """Measure, write, draw.

        Returns:
            Content of `analysis.json`.
        """
        case = self.open_case(None)
        samples = case.samples(self.args.images)
        with first_pass(case.model):
            references = reference_logits(case.model, samples)
        own = case.packed(self.packed) if self.packed else case.calibrated(OWN)
        choices = select_points(own.rules.enabled, self.args.points)
        for name in (*self.files(existing=False), SUMMARY):
            # what an earlier analysis left must not look like the result of this one
            (self.folder / name).unlink(missing_ok=True)
        statistics: list[Statistics] = []
        if 'statistics' in self.args.what:
            with first_pass(case.model):
                statistics, histograms = describe(own, samples, choices, self.folder)
            plot_histograms(self.folder / 'histograms.png', histograms, statistics)
        if 'sensitivity' in self.args.what:
            with first_pass(case.model):
                sizes = measure_sizes(own, samples)
            scores = ScoreFile(self.folder, self.conditions(case))
            table = self.folder / 'sensitivity.csv'
            self.examination = Examination(choices, self.args.bits, samples, references, sizes, scores, table)
            self.examination.run(lambda bits: self.subject_at(bits, own))
            rows = self.examination.rows()
            plot_sensitivities(self.folder / 'sensitivity.png', rows, self.examination.everything)
            plot_roles(self.folder / 'roles.png', rows)
        if statistics:
            rows = self.examination.rows() if self.examination else []
            plot_statistics(self.folder / 'statistics.png', statistics, rows)
        summary = self.summary(own, sum(len(sample.boxes) for sample in samples))
        write_json(self.folder / SUMMARY, summary)
        return summary

    def open_case(self, bits: int | None) -> Case:
        """Load the model for the recipe at other bits; None: as it is."""
        args, recipe = self.args, self.recipe if bits is None else at_bits(self.recipe, bits)
        config = load_model_config(args.model_config, args.cfg_options)
        return Case(args, config, recipe, self.temporary / str(bits), cache_folder())

    @contextmanager
    def subject_at(self, bits: int | None, own: Subject) -> Iterator[Subject]:
        """The calibrated model of some bits, which decodes once; None: the one that is there."""
        subject = own if bits is None else self.open_case(bits).calibrated(str(bits))
        with first_pass(subject.model):
            yield subject

    def conditions(self, case: Case) -> str:
        """Fingerprint of what scores depend on beside bits, image and quantizer."""
        packed = read_manifest(self.packed)['sha256'] if self.packed else None
        return fingerprint([case.origin, packed, torch.__version__])

    def summary(self, own: Subject, boxes: int) -> dict[str, Any]:
        """Content of `analysis.json`."""
        everything = self.examination.everything if self.examination else None
        bits = self.recipe.bits.resolved()
        return dict(
            model=Path(self.args.model_config).stem,
            quant=recipe_name(self.args.quant_config),
            algorithm=self.recipe.algorithm,
            bits=bits,
            label=run_label(self.recipe.algorithm, bits, own.rules.bit_counts()),
            packed=self.packed and str(self.packed),
            images=self.args.images,
            boxes=boxes,
            quantizers=len(own.rules.enabled),
            points=self.args.points,
            widths=sorted(set(self.args.bits)),
            all_on_sqnr_db=everything and everything.sqnr,
            all_on_iou=everything and everything.mean_iou,
            folder=str(self.folder),
        )

    def text(self) -> str:
        """The worst quantizers, as a table."""
        if self.examination is None or self.examination.everything is None:
            return ''
        everything = self.examination.everything
        head = f'all on: {everything.sqnr:.1f} dB, mean IoU {everything.mean_iou:.4f} with the float masks'
        return f'{head}\n\n{worst_table(self.examination.rows(), everything)}'

    def files(self, existing: bool = True) -> Sequence[str]:
        """Names of the files that this analysis writes, or those of them that are there."""
        names = [name for part in self.args.what for name in FILES[part]]
        return [name for name in names if not existing or (self.folder / name).is_file()]
