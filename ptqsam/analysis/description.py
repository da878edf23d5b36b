"""Describe activations and weights: statistics, histograms, groups of channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ptqsam.analysis.channels import channel_arrangement
from ptqsam.analysis.histograms import Histogram, channel_groups
from ptqsam.analysis.sensitivity import Subject
from ptqsam.analysis.statistics import Collector, Statistics, weight_statistics, write_statistics
from ptqsam.analysis.watch import show_images
from ptqsam.fileio import write_json
from ptqsam.reconstruction.engine import Sample
from ptqsam.solver.rules import Choice


def describe(
    subject: Subject, samples: Sequence[Sample], choices: Sequence[Choice], folder: Path
) -> tuple[list[Statistics], dict[str, Any]]:
    """Write `statistics.csv`, `histograms.json` and `channel_groups.json`.

    Args:
        subject: the model.
        samples: images and boxes.
        choices: points to describe.
        folder: where to.

    Returns:
        Rows of the first file, content of the second.
    """
    activations = subject.switches.activations
    collectors = {
        choice.point.path: Collector(
            choice, activations[choice.point.path], channel_arrangement(subject.model.sam, choice.point.path)
        )
        for choice in choices
        if choice.point.kind == 'act'
    }

    def collect(path: str, x: Tensor) -> None:
        if path in collectors:
            collectors[path].add(x)

    show_images(subject, samples, collect, 'statistics')
    rows = [
        collectors[choice.point.path].row(len(samples))
        if choice.point.kind == 'act'
        else weight_statistics(choice, *subject.switches.weights[choice.point.path], choice.point.ch_axis)
        for choice in choices
    ]
    # once more, now that the ends of the bins are known
    counted = {path: Histogram(collector.low, collector.high) for path, collector in collectors.items()}

    def count(path: str, x: Tensor) -> None:
        if path in counted:
            counted[path].add(x)

    show_images(subject, samples, count, 'histograms')
    histograms = {
        path: histogram.plain(collectors[path].choice.point.role, activations[path])
        for path, histogram in counted.items()
    }
    write_statistics(folder / 'statistics.csv', rows)
    write_json(folder / 'histograms.json', histograms, indent=None)
    write_json(folder / 'channel_groups.json', channel_groups(collectors), indent=None)
    return rows, histograms
