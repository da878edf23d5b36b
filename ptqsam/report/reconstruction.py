"""What reconstruction did to each unit: a table and a picture."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from ptqsam.fileio import atomic_path, write_text
from ptqsam.report.plots import COLOURS, module_groups

if TYPE_CHECKING:
    from ptqsam.reconstruction.optimise import Outcome

COLUMNS = ('unit', 'loss_nearest', 'loss_reconstructed', 'ratio', 'flipped', 'unsettled')
WORST = 10
# inches: panels of bars, small curves, what is around them
WIDTH, HEAD, CELL, FOOT = 15.0, 7.2, 0.62, 0.9
CURVES_PER_ROW = 16
# points of a loss curve; each is the mean of its share of the iterations
POINTS = 60
# upper end of the curves' axis, in losses of nearest rounding
CURVE_TOP = 1.5


def write_outcomes(path: Path, outcomes: 'Mapping[str, Outcome]') -> None:
    """Write one CSV row per unit.

    Args:
        path: CSV file, written atomically.
        outcomes: unit -> what reconstruction did to it, in the order of execution.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(COLUMNS)
    for unit, outcome in outcomes.items():
        numbers = (outcome.nearest, outcome.reconstructed, ratio(outcome), outcome.flipped, outcome.unsettled)
        table.writerow((unit, *(f'{value:.6g}' for value in numbers)))
    write_text(path, text.getvalue())


def ratio(outcome: 'Outcome') -> float:
    """Loss after reconstruction over that of nearest rounding; 1 where there was nothing to gain."""
    return outcome.reconstructed / outcome.nearest if outcome.nearest else 1.0


def plot_outcomes(path: Path, outcomes: 'Mapping[str, Outcome]') -> None:
    """Draw loss, flipped and unsettled weights of every unit, the units that gained least named, and loss curves.

    Args:
        path: PNG file, written atomically.
        outcomes: unit -> what reconstruction did to it, in the order of execution; at least one.
    """
    names = list(outcomes)
    # module_groups expects paths of something within a unit
    groups = {name.rstrip('.'): group for name, group in module_groups([f'{name}.' for name in names]).items()}
    palette = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(groups.values()))}
    colours = [palette[groups[name]] for name in names]
    rows = math.ceil(len(names) / CURVES_PER_ROW)
    height = HEAD + FOOT + rows * CELL
    figure = Figure(figsize=(WIDTH, height), dpi=110)
    FigureCanvasAgg(figure)

    def panel(bottom: float, size: float) -> Axes:
        """Axes at a distance from the top edge, in inches."""
        return figure.add_axes((0.045, 1 - bottom / height, 0.6, size / height))

    losses = panel(3.2, 2.8)
    ratios = np.array([ratio(outcome) for outcome in outcomes.values()])
    worst = draw_ratios(losses, ratios, colours)
    list_units(figure, 1 - 0.4 / height, 0.26 / height, [(names[i], float(ratios[i])) for i in worst])
    flipped = [outcome.flipped for outcome in outcomes.values()]
    draw_shares(panel(4.8, 1.2), flipped, colours, 'weights not rounded to nearest')
    unsettled = [outcome.unsettled for outcome in outcomes.values()]
    shares = panel(6.4, 1.2)
    draw_shares(shares, unsettled, colours, 'rounding variables that were still between 0 and 1 at the end')
    shares.set_xlabel('units in order of execution')
    figure.text(
        0.045,
        1 - 7.05 / height,
        'loss over the iterations, 1 (dotted) is nearest rounding with nothing dropped',
        fontsize=12,
    )
    curves = [shortened(relative_losses(outcome)) for outcome in outcomes.values()]
    draw_curves(figure, curves, colours, height, worst)
    patches = [Patch(color=colour, label=group) for group, colour in palette.items()]
    figure.legend(handles=patches, loc='lower left', bbox_to_anchor=(0.035, 0), ncols=len(COLOURS), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_ratios(axes: Axes, ratios: np.ndarray, colours: Sequence[str]) -> list[int]:
    """Draw the loss after over the loss before as bars from 1, and number the highest.

    Args:
        axes: where to draw.
        ratios: of each unit (n,).
        colours: of each bar.

    Returns:
        Indices of the units that gained least, the worst first.
    """
    finite = ratios[np.isfinite(ratios) & (ratios > 0)]
    least, most = (float(f(finite, initial=1.0)) for f in (np.min, np.max))
    # an exact unit has no place on a logarithmic axis
    heights = np.clip(np.nan_to_num(ratios, nan=most, posinf=most), least / 1.1, most)
    places = np.arange(len(ratios))
    axes.bar(places, heights - 1, bottom=1, color=list(colours), width=0.85)
    worst = [i for i in np.argsort(-ratios, kind='stable').tolist() if not math.isnan(ratios[i])][:WORST]
    circle = dict(boxstyle='circle,pad=0.15', facecolor='white', linewidth=0.6)
    for rank, i in enumerate(worst, 1):
        tip = (i, max(heights[i], 1.0))
        axes.annotate(f'{rank}', tip, (0, 6), textcoords='offset points', ha='center', fontsize=7, bbox=circle)
    improved = int((ratios < 1).sum())
    axes.set_title('reconstruction loss after / before, 1 is nearest rounding', loc='left')
    axes.set_title(f'{improved} of {len(ratios)} units improved', loc='right', fontsize=9, color='grey')
    span = max(most / least, 1.05)
    axes.set(yscale='log', ylim=(least / span**0.06, most * span**0.16))
    axes.axhline(1, color='black', linewidth=0.8)
    ticks = tick_values(least, most)
    axes.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    finish(axes, len(ratios))
    return worst


def tick_values(least: float, most: float) -> list[float]:
    """Round numbers for a logarithmic axis, few enough to be read."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        values = [float(f'{step}e{decade}') for decade in decades for step in steps]
        inside = [value for value in values if least <= value <= most]
        if len(inside) <= 9:
            break
    if len(inside) < 3:
        inside = np.round(np.linspace(least, most, 4), 3).tolist()
    return sorted({1.0, *inside[:: len(inside) // 12 + 1]})


def draw_shares(axes: Axes, shares: Sequence[float], colours: Sequence[str], title: str) -> None:
    """Draw shares as bars in percent."""
    axes.bar(np.arange(len(shares)), [100 * share for share in shares], color=list(colours), width=0.85)
    axes.set_title(title, loc='left')
    axes.set_ylim(0, max(1.0, 105 * max(shares)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    finish(axes, len(shares))


def finish(axes: Axes, count: int) -> None:
    """What all panels of bars have in common."""
    axes.set_xlim(-1, max(count, 1))
    axes.set_xticks([])
    axes.grid(axis='y', alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'bottom']].set_visible(False)


def list_units(figure: Figure, top: float, step: float, units: Sequence[tuple[str, float]]) -> None:
    """Write ratios and names of units beside the first panel, numbered as their bars are.

    Args:
        figure: where to write.
        top: upper edge, fraction of the figure's height.
        step: height of a line, likewise.
        units: name and ratio, the worst first.
    """
    figure.text(0.66, top, 'least gained', fontsize=9, color='grey')
    for rank, (name, value) in enumerate(units, 1):
        for x, text, align in ((0.672, f'{rank}', 'right'), (0.712, f'{value:.3f}', 'right'), (0.72, name, 'left')):
            weight = 'bold' if align == 'right' and x < 0.7 else 'normal'
            figure.text(x, top - rank * step, text, ha=align, fontsize=8, weight=weight)


def draw_curves(
    figure: Figure, curves: Sequence[np.ndarray], colours: Sequence[str], height: float, worst: Sequence[int]
) -> None:
    """Draw a small loss curve of every unit, in rows, all on one scale.

    Args:
        figure: where to draw.
        curves: of each unit.
        colours: of each curve.
        height: of the figure, inches.
        worst: indices of the units that are numbered, in this order.
    """
    width = 0.945 / CURVES_PER_ROW
    for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        row, column = divmod(number, CURVES_PER_ROW)
        bottom = 1 - (HEAD + (row + 1) * CELL) / height
        axes = figure.add_axes((0.045 + column * width, bottom, width * 0.86, CELL * 0.8 / height))
        axes.axhline(1, color='grey', linewidth=0.6, linestyle=':')
        axes.plot(curve, color=colour, linewidth=1.0, marker='.' if len(curve) == 1 else '')
        axes.set(xticks=[], yticks=[], ylim=(0, CURVE_TOP))
        if number in worst:
            axes.text(0.97, 0.06, str(worst.index(number) + 1), transform=axes.transAxes, ha='right', fontsize=7)
        axes.spines[:].set(linewidth=0.4, color='grey')


def relative_losses(outcome: 'Outcome') -> np.ndarray:
    """Losses of all iterations over that of nearest rounding."""
    return outcome.losses.double().cpu().numpy() / (outcome.nearest or 1.0)


def shortened(values: np.ndarray) -> np.ndarray:
    """Means of consecutive values, at most `POINTS` of them."""
    return np.array([part.mean() for part in np.split(values, point_ends(len(values))[:-1])])


def point_ends(length: int) -> list[int]:
    """Number of values up to and with those of each point of a shortened curve."""
    count = min(length, POINTS)
    return [(index + 1) * length // count for index in range(count)]
