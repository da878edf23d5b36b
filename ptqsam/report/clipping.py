"""What clipping did to each quantizer of decoder attention: a table, a picture, a line."""

import csv
import io
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ptqsam.fileio import atomic_path, write_text
from ptqsam.report.condition_number import split_names
from ptqsam.report.plots import COLOURS

# inches per quantizer, and around them
STEP, MARGIN = 0.3, 2.5


@dataclass
class Clipped:
    """A quantizer of q or k before and after; "before" is the range that its own observer chooses on the same tensors.

    Attributes:
        observed_min: smallest value in the float model.
        observed_max: largest.
        before_lo: range before.
        before_hi: likewise.
        after_lo: range after.
        after_hi: likewise.
        percentile: that the range after comes from; None: the observer's range was kept.
        overlap_before: focus overlap with the float attention, this quantizer alone being on.
        overlap_after: likewise.
        attention_before: focus overlap with all quantizers of the attention on that are clipped.
        attention_after: likewise.
        mse_before: mean squared error of the float model's values.
        mse_after: likewise.
    """

    observed_min: float
    observed_max: float
    before_lo: float
    before_hi: float
    after_lo: float
    after_hi: float
    percentile: float | None
    overlap_before: float
    overlap_after: float
    attention_before: float
    attention_after: float
    mse_before: float
    mse_after: float


def write_clipping(path: Path, clipped: Mapping[str, Clipped]) -> None:
    """Write one CSV row per quantizer.

    Args:
        path: CSV file, written atomically.
        clipped: quantizer path -> what was done, in module order.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(('quantizer', *(part.name for part in fields(Clipped))))
    for name, row in clipped.items():
        # nine digits give a float32 back exactly
        table.writerow((name, *('' if value is None else f'{value:.9g}' for value in astuple(row))))
    write_text(path, text.getvalue())


def summarise_clipping(clipped: Mapping[str, Clipped], places: int) -> str:
    """One line about all attentions: how many quantizers were clipped, and what it did to the focus.

    Args:
        clipped: quantizer path -> what was done, at least one.
        places: inputs and outputs of q and k projections that there are.
    """
    rows = list(clipped.values())
    means = [np.mean([getattr(row, f'attention_{when}') for row in rows]) for when in ('before', 'after')]
    kept = sum(row.percentile is None for row in rows)
    narrower = np.median([(row.after_hi - row.after_lo) / max(row.before_hi - row.before_lo, 1e-30) for row in rows])
    return (
        f'{len(rows)} of {places} inputs and outputs of q and k projections got a range'
        + (f', {places - len(rows)} are left out' if places > len(rows) else '')
        + (f', {kept} of them that of the observer, which no percentile beat' if kept else '')
        + f'; their width is in the median {narrower:.2g} times the one before; mean focus overlap of the attentions '
        f'{means[0]:.3f} -> {means[1]:.3f}'
    )


def plot_clipping(path: Path, clipped: Mapping[str, Clipped]) -> None:
    """Draw the extremes and the ranges of every quantizer, and the focus overlap, before and after.

    Args:
        path: PNG file, written atomically.
        clipped: quantizer path -> what was done, in module order; at least one.
    """
    rows, places = list(clipped.values()), np.arange(len(clipped))
    figure = Figure(figsize=(max(9.0, MARGIN + STEP * len(rows)), 9), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    ranges, overlaps = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    bars = (
        ('largest and smallest value', 'observed_min', 'observed_max', 0.0, 'lightgrey', 7.0),
        ('range before', 'before_lo', 'before_hi', -0.17, COLOURS[0], 3.5),
        ('range after', 'after_lo', 'after_hi', 0.17, COLOURS[5], 3.5),
    )
    for label, low, high, shift, colour, width in bars:
        ends = np.array([(getattr(row, low), getattr(row, high)) for row in rows])
        ranges.vlines(places + shift, ends[:, 0], ends[:, 1], color=colour, linewidth=width, label=label)
    # linear up to the middle of what is seen, so that narrow ranges do not shrink to a dot
    extents = [max(abs(row.after_lo), abs(row.after_hi), 1e-6) for row in rows]
    ranges.set_yscale('symlog', linthresh=float(np.median(extents)), linscale=2)
    ranges.axhline(0, color='black', linewidth=0.6)
    ranges.set_title('values of inputs and outputs of q and k projections', loc='left', fontsize=11)
    for when, shift, colour in (('before', -0.17, COLOURS[0]), ('after', 0.17, COLOURS[5])):
        alone, together = ([getattr(row, f'{what}_{when}') for row in rows] for what in ('overlap', 'attention'))
        overlaps.plot(places + shift, alone, 'o', color=colour, markersize=5, label=f'{when}, this quantizer alone')
        overlaps.plot(places + shift, together, '_', color=colour, markersize=9, label=f'{when}, whole attention')
    overlaps.set(ylim=(0, 1.02), xlim=(-1, len(rows)))
    overlaps.set_title('focus overlap with the float attention', loc='left', fontsize=11)
    names = split_names(list(clipped))
    overlaps.set_xticks(places, [name for _, name in names], rotation=90, fontsize=7)
    attentions = [name.removesuffix('.input').rsplit('.', 1)[0] for name in clipped]
    for axes in (ranges, overlaps):
        for place in places[1:]:
            if attentions[place] != attentions[place - 1]:
                axes.axvline(place - 0.5, color='grey', linewidth=0.5)
        axes.grid(axis='y', alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
