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
    """A quantizer of q or k: the range that it got, and the one that its own observer chooses on the same tensors.

    Attributes:
        observed_min: smallest value in the float model.
        observed_max: largest.
        observer_lo: range of the observer, which never was in the model.
        observer_hi: likewise.
        lo: range that the quantizer got.
        hi: likewise.
        percentile: that the latter comes from; None: it is that of the observer.
        overlap_observer: focus overlap with the float attention, this quantizer alone being on, in the observer's.
        overlap: likewise, in the one that it got.
        attention_overlap_observer: focus overlap with all quantizers of the attention on that are clipped.
        attention_overlap: likewise.
        mse_observer: mean squared error of the float model's values.
        mse: likewise.
    """

    observed_min: float
    observed_max: float
    observer_lo: float
    observer_hi: float
    lo: float
    hi: float
    percentile: float | None
    overlap_observer: float
    overlap: float
    attention_overlap_observer: float
    attention_overlap: float
    mse_observer: float
    mse: float


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
    observer, chosen = (np.mean([getattr(row, f'attention_overlap{of}') for row in rows]) for of in ('_observer', ''))
    kept = sum(row.percentile is None for row in rows)
    width = np.median([(row.hi - row.lo) / max(row.observer_hi - row.observer_lo, 1e-30) for row in rows])
    return (
        f'{len(rows)} of {places} inputs and outputs of q and k projections got a range of PCC'
        + (f', {places - len(rows)} are left out' if places > len(rows) else '')
        + (f', {kept} of them that of the observer, which no percentile beat' if kept else '')
        + f'; they are in the median {width:.2g} times as wide as those of the observers; mean focus overlap of the '
        f'attentions {chosen:.3f}, with the ranges of the observers {observer:.3f}'
    )


def plot_clipping(path: Path, clipped: Mapping[str, Clipped]) -> None:
    """Draw the extremes and the ranges of every quantizer, and the focus overlap.

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
        ('range of the observer', 'observer_lo', 'observer_hi', -0.17, COLOURS[0], 3.5),
        ('range of PCC', 'lo', 'hi', 0.17, COLOURS[5], 3.5),
    )
    for label, low, high, shift, colour, width in bars:
        ends = np.array([(getattr(row, low), getattr(row, high)) for row in rows])
        ranges.vlines(places + shift, ends[:, 0], ends[:, 1], color=colour, linewidth=width, label=label)
    # linear up to the middle of what is seen, so that narrow ranges do not shrink to a dot
    extents = [max(abs(row.lo), abs(row.hi), 1e-6) for row in rows]
    ranges.set_yscale('symlog', linthresh=float(np.median(extents)), linscale=2)
    ranges.axhline(0, color='black', linewidth=0.6)
    ranges.set_title('values of inputs and outputs of q and k projections', loc='left', fontsize=11)
    for whose, suffix, shift, colour in (('observer', '_observer', -0.17, COLOURS[0]), ('PCC', '', 0.17, COLOURS[5])):
        alone, together = ([getattr(row, f'{of}{suffix}') for row in rows] for of in ('overlap', 'attention_overlap'))
        overlaps.plot(places + shift, alone, 'o', color=colour, markersize=5, label=f'{whose}, this quantizer alone')
        overlaps.plot(places + shift, together, '_', color=colour, markersize=9, label=f'{whose}, whole attention')
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
