"""The table of a run or a sweep in the papers' layout: detectors and recipes down, SAMs and bits across."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import fmean, stdev
from string import ascii_lowercase
from typing import Any

from ptqsam.report.published import Source
from ptqsam.sweep.records import Record

METRIC = 'segm_mAP'
FP = 'FP'
# in the order of the papers' tables
SAMS = ('mobile-sam', 'sam-vit-b', 'sam-vit-l', 'sam-vit-h')
DETECTORS = ('oracle', 'faster-rcnn_r50', 'yolox-nano', 'yolox-l', 'hdetr_r50', 'dino_focalnet-l')


@dataclass(frozen=True)
class Cell:
    """What stands at one place of the table.

    Attributes:
        value: mAP in percent, mean over seeds; None if there is none.
        spread: sample standard deviation over seeds; None of fewer than two.
        drop: difference to the float model; None if that is not known.
        seeds: runs that the mean is over.
        stamp: number of the note that names the published defects of these runs; 0: they have none.
        best: highest honest value of its column among the recipes of a detector.
        missing: what stands there instead of a value.
    """

    value: float | None = None
    spread: float | None = None
    drop: float | None = None
    seeds: int = 0
    stamp: int = 0
    best: bool = False
    missing: str = ''

    @property
    def number(self) -> str:
        """The value with its spread, or what stands there instead."""
        if self.value is None:
            return self.missing or '-'
        return f'{self.value:.1f}' + ('' if self.spread is None else f' ± {self.spread:.1f}')

    @property
    def loss(self) -> str:
        """The difference to the float model, as `-16.3`; '' if it is not known."""
        return '' if self.drop is None else f'{self.drop:+.1f}'


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        detector: its name and that of the pipeline's variant.
        label: the recipe, with those options in which runs differ.
        source: letter of the note on where these numbers were published; '' for our own.
        cells: one per column.
    """

    detector: str
    label: str
    cells: tuple[Cell, ...]
    source: str = ''


@dataclass(frozen=True)
class Grid:
    """The table.

    Attributes:
        sams: label of a SAM, and the columns below it; the first is that of the float model.
        rows: those of a detector stand together.
        notes: what the numbers mean, what cannot be compared, what failed; one line each.
    """

    sams: tuple[tuple[str, tuple[str, ...]], ...]
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def detectors(self) -> list[tuple[str, list[Row]]]:
        """Rows of each detector, in order."""
        return [(name, list(rows)) for name, rows in groupby(self.rows, key=lambda row: row.detector)]


@dataclass(frozen=True)
class _Place:
    """Where a run stands in the table."""

    detector: str
    sam: str
    label: str
    bits: str

    @classmethod
    def of(cls, record: Record) -> '_Place':
        options = [option_text(key, value) for key, value in sorted(record.options.items())]
        return cls(*pipeline_parts(record.model), ', '.join((record.recipe, *options)), bits_label(record.bits))


@dataclass
class _Runs:
    """The runs of a table by their place, and what holds for all of them."""

    at: dict[_Place, list[Record]] = field(default_factory=dict)
    stamps: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def placed(self) -> list[tuple[_Place, Record]]:
        return [(place, record) for place, records in self.at.items() for record in records]

    @property
    def records(self) -> list[Record]:
        return [record for _, record in self.placed]


def build_grid(records: Sequence[Record], published: Sequence[Source] = ()) -> Grid:
    """Arrange runs as a table.

    Args:
        records: runs, finished or not; those that differ in their seed alone share a place.
        published: results to stand below ours.

    Returns:
        The table.
    """
    runs = _Runs()
    for record in records:
        runs.at.setdefault(_Place.of(record), []).append(record)
    runs.stamps = list(dict.fromkeys(stamp for record in records if (stamp := compat(record))))
    names = sorted({place.sam for place in runs.at}, key=lambda sam: _rank(SAMS, sam))
    columns = {
        sam: sorted({place.bits for place in runs.at if place.sam == sam}, key=lambda bits: (_widths(bits), bits))
        for sam in names
    }
    rows: list[Row] = []
    stated = {(record.model, record.recipe, bits_label(record.bits)) for record in records}
    sources = dict(zip(ascii_lowercase, (source for source in published if stated & set(source.values)), strict=False))
    lines = dict.fromkeys((place.detector, place.label) for place in runs.at)
    for detector, block in groupby(sorted(lines, key=lambda line: _rank(DETECTORS, line[0])), key=lambda line: line[0]):
        ours = [_own_row(detector, label, runs, columns) for _, label in block]
        for row in _with_best(ours):
            rows += [row, *_published_rows(row, runs, columns, sources)]
    return Grid(
        sams=tuple((_label(sam), (FP, *columns[sam])) for sam in names),
        rows=tuple(rows),
        notes=tuple(_notes(runs, sources)),
    )


def metric(record: Record, which: str) -> float | None:
    """mAP in percent of the model `fp` or `quant` of a run, None if it is not known."""
    value = ((record.result or {}).get('metrics', {}).get(which) or {}).get(METRIC)
    return value * 100 if isinstance(value, int | float) and math.isfinite(value) else None


def compat(record: Record) -> tuple[str, ...]:
    """Published defects that were switched on."""
    return tuple(record.result['compat']) if record.result else ()


def pipeline_parts(model: str) -> tuple[str, str]:
    """Detector (with the pipeline's variant) and SAM of a pipeline's name; its SAM may be ''."""
    match = re.fullmatch(r'(.+?)_((?:mobile-)?sam[^_]*)(?:_(.+))?', model)
    if match is None:
        return model, ''
    detector, sam, variant = match.groups()
    return (f'{detector}, {variant}' if variant else detector), sam


def bits_label(bits: dict[str, Any]) -> str:
    """Bit widths as `W4A8`; those of parts that differ follow, as in `W4A4 (decoder W6A8)`."""
    whole = f'W{bits.get("weight")}A{bits.get("act")}'
    parts = {name: bits_label(inner) for name, inner in bits.items() if isinstance(inner, dict)}
    words = [f'{name} {label}' for name, label in parts.items() if label != whole]
    return whole + (f' ({", ".join(words)})' if words else '')


def option_text(key: str, value: Any) -> str:
    """An option as it is given on a command line."""
    return f'{key}={value if isinstance(value, str) else json.dumps(value, default=str)}'


def _own_row(detector: str, label: str, runs: _Runs, columns: dict[str, list[str]]) -> Row:
    cells: list[Cell] = []
    for sam, widths in columns.items():
        cells.append(Cell(_whole(runs, detector, sam, label)))
        cells += [_own_cell(runs.at.get(_Place(detector, sam, label, bits), []), runs.stamps) for bits in widths]
    return Row(detector, label, tuple(cells))


def _whole(runs: _Runs, detector: str, sam: str, label: str) -> float | None:
    """mAP of the float model: of a run in the same row if there is one, else with equal pipeline options."""
    row = [record for place, record in runs.placed if (place.detector, place.label) == (detector, label)]
    variants = [_pipeline_options(record) for record in row]
    column = [record for place, record in runs.placed if (place.detector, place.sam) == (detector, sam)]
    first = [record for record in column if record in row]
    alike = [record for record in column if _pipeline_options(record) in variants]
    return next((value for record in (*first, *alike) if (value := metric(record, 'fp')) is not None), None)


def _pipeline_options(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.options.items() if key.startswith('cfg:')}


def _own_cell(records: Sequence[Record], stamps_seen: list[tuple[str, ...]]) -> Cell:
    done = [record for record in records if metric(record, 'quant') is not None]
    if not done:
        # a failure weighs more than what has not been tried
        states = [state for state in ('failed', 'interrupted', 'running', 'pending') if state in map(_state, records)]
        return Cell(missing=states[0] if states else '-')
    values = [value for record in done if (value := metric(record, 'quant')) is not None]
    drops = [q - fp for record, q in zip(done, values, strict=True) if (fp := metric(record, 'fp')) is not None]
    stamps = {compat(record) for record in done} - {()}
    return Cell(
        value=fmean(values),
        spread=stdev(values) if len(values) > 1 else None,
        drop=fmean(drops) if len(drops) == len(values) else None,
        seeds=len(values),
        stamp=stamps_seen.index(min(stamps)) + 1 if stamps else 0,
    )


def _state(record: Record) -> str:
    return 'failed' if record.status == 'done' else record.status


def _images(record: Record) -> int | None:
    return record.result.get('images') if record.result else None


def _with_best(rows: list[Row]) -> list[Row]:
    """Mark the best of each column; one that stands alone is not the best of anything."""
    best: list[list[bool]] = [[False] * len(row.cells) for row in rows]
    for place in range(len(rows[0].cells)):
        values = [None if row.cells[place].stamp else row.cells[place].value for row in rows]
        known = [round(value, 1) for value in values if value is not None]
        if len(known) > 1 and any(row.cells[place].seeds for row in rows):
            for number, value in enumerate(values):
                best[number][place] = value is not None and round(value, 1) == max(known)
    return [
        replace(row, cells=tuple(replace(cell, best=b) for cell, b in zip(row.cells, marks, strict=True)))
        for row, marks in zip(rows, best, strict=True)
    ]


def _published_rows(row: Row, runs: _Runs, columns: dict[str, list[str]], sources: dict[str, Source]) -> list[Row]:
    """What papers state for the places of a row."""
    models = {place: records[0] for place, records in runs.at.items() if place.detector == row.detector}
    recipe = next(record.recipe for place, record in models.items() if place.label == row.label)
    rows = []
    for letter, source in sources.items():
        cells: list[Cell] = []
        stated = False
        for sam, widths in columns.items():
            model = next((record.model for place, record in models.items() if place.sam == sam), '')
            whole = source.whole.get(model)
            values = [source.values.get((model, recipe, bits)) for bits in widths]
            drops = [None if None in (value, whole) else value - whole for value in values]  # type: ignore[operator]
            cells += [Cell(whole), *(Cell(v, drop=drop) for v, drop in zip(values, drops, strict=True))]
            # the float model alone says nothing about a recipe
            stated |= any(value is not None for value in values)
        if stated:
            rows.append(Row(row.detector, 'published', tuple(cells), letter))
    return rows


def _notes(runs: _Runs, sources: dict[str, Source]) -> list[str]:
    """Lines below the table."""
    records = runs.records
    images = sorted({n for record in records if (n := _images(record)) is not None})
    several = any(len(group) > 1 for group in runs.at.values())
    notes = [
        f'Mask mAP in percent (difference to FP, the float model) on {" or ".join(map(str, images)) or "no"} images'
        + ('; mean ± sample standard deviation over seeds.' if several else '.')
    ]
    if len(images) > 1:
        notes.append('Not all runs were evaluated on the same images: do not compare them.')
    notes += [f'[{n}] with published defects: {", ".join(stamp)}' for n, stamp in enumerate(runs.stamps, start=1)]
    notes += [f'[{letter}] as published, {source.name}: {source.note}.' for letter, source in sources.items()]
    if sources:
        notes.append("Published numbers are on all 5000 images of COCO val2017, with the papers' protocols.")
    notes += [f'{name}: {count} seeds of {total}' for name, count, total in _incomplete(runs)]
    for record in records:
        if record.result is None and record.error:
            notes.append(f'{record.status.capitalize()}: {record.name}: {record.error}')
        elif record.result is not None and metric(record, 'quant') is None:
            notes.append(f'Failed: {record.name}: its result has no {METRIC}')
    waiting = Counter(record.status for record in records if record.result is None and not record.error)
    if waiting:
        notes.append(f'Not finished: {", ".join(f"{count} {status}" for status, count in waiting.items())}')
    return notes


def _incomplete(runs: _Runs) -> Iterable[tuple[str, int, int]]:
    """Places where some seeds have a result, and others have none."""
    for place, records in runs.at.items():
        done = sum(metric(record, 'quant') is not None for record in records)
        if 0 < done < len(records):
            yield ' '.join(filter(None, (place.detector, place.sam, place.label, place.bits))), done, len(records)


def _label(sam: str) -> str:
    return {'mobile-sam': 'MobileSAM', **{f'sam-vit-{size}': f'SAM-{size.upper()}' for size in 'blh'}}.get(sam, sam)


def _rank(order: Sequence[str], name: str) -> tuple[int, str]:
    """Place in a known order, then by the alphabet; variants stand behind their detector."""
    first = name.split(',')[0]
    return (order.index(first) if first in order else len(order), name)


def _widths(bits: str) -> tuple[int, ...]:
    """`W4A8` as (4, 8), so that columns stand by width."""
    return tuple(map(int, re.findall(r'\d+', bits)))
