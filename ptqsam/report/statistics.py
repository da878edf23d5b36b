"""Pictures of statistics: which property of a tensor goes with a high error, and histograms of the worst ones."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ptqsam.fileio import atomic_path
from ptqsam.report.plots import COLOURS

if TYPE_CHECKING:
    from ptqsam.analysis.statistics import Statistics
    from ptqsam.analysis.tables import Sensitivity

# histograms on a sheet
SHEET = 12
# points that a scatter names
NAMED = 5
# kinds of tensors, the first that fits: part of the role -> name
FAMILIES = (
    ('softmax', 'softmax output'),
    ('.weight', 'weight'),
    ('lin2.input', 'input of 2nd MLP layer'),
    ('conv', 'input of convolution'),
    ('.input', 'input of linear layer'),
    ('', 'q, k, v'),
)
# column -> axis label, which rows have it, logarithmic
PANELS: tuple[tuple[str, str, bool], ...] = (
    ('kurtosis', 'excess kurtosis + 3 (heavy tails: HLUQ)', True),
    ('channel_spread', 'largest over median channel range (CAG)', True),
    ('outlier_ratio', 'largest magnitude over 99.9 % quantile (PCC)', True),
    ('bimodality_coefficient', "Sarle's bimodality coefficient (BIG)", False),
    ('share_above', 'share of attention scores above 0.01 (AGQ, LNQ)', True),
    ('condition_number', 'condition number of the weight (ACNR)', True),
)


def family_of(role: str) -> str:
    """Kind of tensor that a role stands for."""
    return next(name for part, name in FAMILIES if part in role)


def plot_statistics(path: Path, rows: Sequence['Statistics'], sensitivities: Sequence['Sensitivity']) -> None:
    """Draw a scatter for each statistic against the quantizer's harm.

    Harm is the SQNR of the mask logits with the quantizer alone on where that was measured, else the SQNR of the tensor
    itself. The points with the least are named.

    Args:
        path: PNG file, written atomically.
        rows: statistics.
        sensitivities: of the same quantizers, or nothing.
    """
    own = {row.point.path: row.enabled.sqnr for row in sensitivities if row.own and row.enabled}
    label = 'SQNR of mask logits, alone on, dB' if own else 'SQNR of the quantized tensor, dB'
    harm = {row.path: own.get(row.path, math.nan) if own else row.sqnr_db for row in rows}
    figure = Figure(figsize=(15, 8.5), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    colours = {name: COLOURS[i] for i, (_, name) in enumerate(FAMILIES)}
    for axes, (column, title, logarithmic) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        shift = 3 if column == 'kurtosis' else 0
        found = [(getattr(row, column), harm[row.path], row) for row in rows]
        points = [(x + shift, y, row) for x, y, row in found if x is not None and math.isfinite(x) and math.isfinite(y)]
        for name, colour in colours.items():
            x, y = [[point[i] for point in points if family_of(point[2].role) == name] for i in (0, 1)]
            axes.plot(x, y, 'o', color=colour, markersize=4, alpha=0.75, label=name)
        name_points(axes, sorted(points, key=lambda point: point[1])[:NAMED])
        axes.set_title(title, loc='left', fontsize=10)
        axes.set_ylabel(label, fontsize=8)
        if logarithmic and points:
            axes.set_xscale('log')
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=len(FAMILIES), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def name_points(axes: Axes, points: Sequence[tuple[float, float, 'Statistics']]) -> None:
    """Write the ends of the paths of some points beside them."""
    for x, y, row in points:
        axes.annotate(short(row.path), (x, y), (5, 0), textcoords='offset points', fontsize=6, va='center')


def short(path: str) -> str:
    """A path without the words that all paths of its part share."""
    for long, brief in (('image_encoder.', 'enc.'), ('mask_decoder.transformer.', 'dec.'), ('cross_attn_', '')):
        path = path.replace(long, brief)
    return path


def plot_histograms(path: Path, histograms: Mapping[str, dict[str, Any]], rows: Sequence['Statistics']) -> None:
    """Draw the activations whose quantized values have the lowest SQNR, with their levels.

    Args:
        path: PNG file, written atomically; not written without activations.
        histograms: content of `histograms.json`.
        rows: statistics of the same points.
    """
    worst = sorted((row for row in rows if row.path in histograms), key=lambda row: row.sqnr_db)[:SHEET]
    if not worst:
        return
    columns = min(3, len(worst))
    lines = math.ceil(len(worst) / columns)
    figure = Figure(figsize=(5 * columns, 2.3 * lines + 0.4), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    places = figure.subplots(lines, columns, squeeze=False).flat
    for axes, row in zip(places, worst, strict=False):
        draw_histogram(axes, histograms[row.path])
        axes.set_title(short(row.path), loc='left', fontsize=8)
        axes.set_title(f'{row.sqnr_db:.1f} dB', loc='right', fontsize=8)
    for axes in list(places):  # those that are left
        axes.remove()
    figure.suptitle('Activations of the lowest SQNR; orange: levels of the quantizer', fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_histogram(axes: Axes, histogram: Mapping[str, Any]) -> None:
    """Draw counts on a logarithmic scale, and a tick for every level.

    Args:
        axes: where to draw.
        histogram: entry of `histograms.json`.
    """
    edges, counts = np.array(histogram['edges']), np.array(histogram['counts'])
    axes.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.5)
    axes.set_yscale('log')
    levels = [level for level in histogram['levels'] if edges[0] - 1e-9 <= level <= edges[-1] + 1e-9]
    axes.vlines(levels, 0, 1, transform=axes.get_xaxis_transform(), color=COLOURS[5], linewidth=0.7, alpha=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.tick_params(labelsize=7)
    axes.spines[['top', 'right']].set_visible(False)
