"""The table of sensitivities: `sensitivity.csv`, and its worst rows for people."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptqsam.analysis.scores import Score
from ptqsam.analysis.statistics import cell
from ptqsam.analysis.watch import Size
from ptqsam.fileio import write_text
from ptqsam.report.summary import align
from ptqsam.solver.rules import Point

COLUMNS = (
    'path',
    'role',
    'kind',
    'bits',
    'numel',
    'macs',
    'enabled_sqnr_db',
    'enabled_iou',
    'disabled_sqnr_db',
    'disabled_iou',
)


@dataclass(frozen=True)
class Sensitivity:
    """A quantizer at a bit width.

    Attributes:
        point: its place.
        bits: bit width.
        own: whether that is the recipe's.
        size: what it handles.
        enabled: masks when it alone is on; None: not measured.
        disabled: masks when it alone is off; None: not measured, or `bits` are not the recipe's.
    """

    point: Point
    bits: int
    own: bool
    size: Size
    enabled: Score | None = None
    disabled: Score | None = None


def write_sensitivities(path: Path, rows: Sequence[Sensitivity]) -> None:
    """Write one CSV row per quantizer and bit width; a score that was not measured gets empty cells.

    Args:
        path: CSV file, written atomically.
        rows: in the order of the rules' decisions.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(COLUMNS)
    for row in rows:
        scores = [
            (None, None) if score is None else (score.sqnr, score.mean_iou) for score in (row.enabled, row.disabled)
        ]
        values = (row.bits, row.size.numel, row.size.macs, *scores[0], *scores[1])
        table.writerow((row.point.path, row.point.role, row.point.kind, *map(cell, values)))
    write_text(path, text.getvalue())


def worst_table(rows: Sequence[Sensitivity], everything: Score, count: int = 10) -> str:
    """The quantizers that cost most at the recipe's bits, as text.

    Args:
        rows: all rows.
        everything: masks when all quantizers are on.
        count: lines per list. Default 10.
    """
    own = [row for row in rows if row.own]
    alone = sorted((row for row in own if row.enabled), key=lambda row: row.enabled.mean_iou)  # type: ignore[union-attr]
    without = sorted((row for row in own if row.disabled), key=lambda row: -row.disabled.sqnr)  # type: ignore[union-attr]
    parts = []
    for title, found, name in (
        ('alone on, lowest mean IoU first', alone, 'enabled'),
        ('alone off, largest gain in SQNR first', without, 'disabled'),
    ):
        lines = [(title, 'bits', 'dB', 'mean IoU')]
        for row in found[:count]:
            score: Score = getattr(row, name)
            gain = score.sqnr - everything.sqnr
            decibels = f'{score.sqnr:.1f}' if name == 'enabled' else f'{gain:+.2f}'
            lines.append((row.point.path, str(row.bits), decibels, f'{score.mean_iou:.4f}'))
        parts.append(align(lines))
    return '\n\n'.join(parts)
