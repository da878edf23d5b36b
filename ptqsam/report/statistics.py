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
# levels that are drawn from the bottom to the top
FEW = 64
# points that a scatter names
NAMED = 5
# kinds of tensors, the first that fits: part of the role -> name
KINDS = (
    ('.weight', 'weight'),
    ('softmax', 'softmax output'),
    ('lin2.input', 'input of 2nd MLP layer'),
    ('conv', 'input of convolution'),
    ('.input', 'input of linear layer'),
    ('', 'q, k, v'),
)
# column -> axis label; those of activations
ACTIVATION_PANELS = (
    ('kurtosis', 'kurtosis (heavy tails: HLUQ)'),
    ('channel_spread', 'largest over median range of a channel (CAG)'),
    ('outlier_ratio', 'largest magnitude over 99.9 % quantile (PCC)'),
    ('bimodality_coefficient', "Sarle's bimodality coefficient (BIG)"),
    ('share_above', 'share of attention scores above 0.01 (AGQ, LNQ)'),
)
# from this ratio on an axis is logarithmic
DECADES = 30.0

# x, y, path, role
Dot = tuple[float, float, str, str]


def kind_of(role: str) -> str:
    """Kind of tensor that a role stands for."""
    return next(name for part, name in KINDS if part in role)


def plot_statistics(path: Path, rows: Sequence['Statistics'], sensitivities: Sequence['Sensitivity']) -> None:
    """Draw a scatter for each statistic against the quantizer's harm, the points of most harm named.

    Harm is the SQNR of the mask logits with the quantizer alone on where that was measured, else the SQNR of the tensor
    itself; for the condition number of a weight, that of its layer's input, whose errors it amplifies.

    Args:
        path: PNG file, written atomically.
        rows: statistics.
        sensitivities: of the same quantizers, or nothing.
    """
    own = {row.point.path: row.enabled.sqnr for row in sensitivities if row.own and row.enabled}
    label = 'SQNR of mask logits, alone on, dB' if own else 'SQNR of the quantized tensor, dB'
    harm = own or {row.path: row.sqnr_db for row in rows}
    figure = Figure(figsize=(15, 8.5), dpi=110)
    FigureCanvasAgg(figure)
    # a layout that is searched takes as long as all drawing
    edges = dict(left=0.04, right=0.99, top=0.96, bottom=0.09, hspace=0.2, wspace=0.16)
    *places, last = figure.subplots(2, 3, gridspec_kw=edges).flat
    for axes, (column, title) in zip(places, ACTIVATION_PANELS, strict=True):
        shift = 3 if column == 'kurtosis' else 0  # of the excess over a normal distribution
        found = [(getattr(row, column), row.path, row.role) for row in rows if row.kind == 'act']
        dots = [(x + shift, harm.get(path, math.nan), path, role) for x, path, role in found if x is not None]
        draw_scatter(axes, dots, title, label)
    found = [(row.condition_number, f'{row.path.removesuffix("weight")}input', row.role) for row in rows]
    dots = [(x, harm.get(path, math.nan), path, role) for x, path, role in found if x is not None]
    draw_scatter(last, dots, 'condition number of the weight, against its input (ACNR)', label)
    handles = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc='lower center', ncols=len(KINDS), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_scatter(axes: Axes, dots: Sequence[Dot], title: str, label: str) -> None:
    """Draw one panel.

    Args:
        axes: where to draw.
        dots: what is not finite is left out.
        title: says what x is.
        label: says what y is.
    """
    dots = [dot for dot in dots if math.isfinite(dot[0]) and math.isfinite(dot[1])]
    for (_, name), colour in zip(KINDS, COLOURS, strict=False):
        chosen = [dot for dot in dots if kind_of(dot[3]) == name]
        if chosen:
            x, y = [dot[0] for dot in chosen], [dot[1] for dot in chosen]
            axes.plot(x, y, 'o', color=colour, markersize=4, alpha=0.75, label=name)
    xs = [dot[0] for dot in dots]
    if xs and min(xs) > 0 and max(xs) > DECADES * min(xs):
        axes.set_xscale('log')
    name_dots(axes, sorted(dots, key=lambda dot: dot[1]))
    axes.set_title(title, loc='left', fontsize=10)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)


def name_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Name the lowest dots, unless a name would lie on another one.

    Args:
        axes: with limits that will stay.
        dots: lowest first.
    """
    bottom, top = axes.get_ylim()
    named: list[float] = []
    for x, y, path, _ in dots:
        if len(named) < NAMED and all(abs(y - other) > 0.03 * (top - bottom) for other in named):
            named.append(y)
            right = axes.transData.transform((x, y))[0] > axes.bbox.x0 + 0.6 * axes.bbox.width
            offset, align = ((-5, 0), 'right') if right else ((5, 0), 'left')
            axes.annotate(short(path), (x, y), offset, textcoords='offset points', fontsize=6, va='center', ha=align)


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
    height = 2.3 * lines + 0.6
    figure = Figure(figsize=(5 * columns, height), dpi=110)
    FigureCanvasAgg(figure)
    edges = dict(left=0.15 / columns, right=0.99, top=1 - 0.6 / height, bottom=0.3 / height, hspace=0.35, wspace=0.13)
    places = figure.subplots(lines, columns, squeeze=False, gridspec_kw=edges).flat
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
    # many levels would hide what lies behind them
    height = 1 if len(levels) <= FEW else 0.12
    axes.vlines(levels, 0, height, transform=axes.get_xaxis_transform(), color=COLOURS[5], linewidth=0.7, alpha=0.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.tick_params(labelsize=7)
    axes.minorticks_off()
    axes.spines[['top', 'right']].set_visible(False)
