"""Pictures of sensitivities: what each quantizer costs alone, and what leaving it out brings back."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ptqsam.fileio import atomic_path
from ptqsam.report.plots import COLOURS, draw_bars, list_worst, module_groups

if TYPE_CHECKING:
    from ptqsam.analysis.scores import Score
    from ptqsam.analysis.tables import Sensitivity

# room of a panel, fraction of the figure's height
HEIGHT = 0.36


def plot_sensitivities(path: Path, rows: Sequence['Sensitivity'], everything: 'Score | None') -> None:
    """Draw two panels of bars over all quantizers in the order of execution, the worst ones named.

    Above, the SQNR of the mask logits with the quantizer alone on: a low bar is bad. Below, what is gained over all
    quantizers on by switching it off: a high bar is bad.

    Args:
        path: PNG file, written atomically.
        rows: those at the recipe's bits are drawn.
        everything: masks when all quantizers are on; None: the lower panel is left empty.
    """
    own = [row for row in rows if row.own]
    paths = [row.point.path for row in own]
    groups = module_groups(paths)
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(groups.values()))}
    alone = np.array([row.enabled.sqnr if row.enabled else math.nan for row in own])
    gain = np.array([row.disabled.sqnr - everything.sqnr if row.disabled and everything else math.nan for row in own])
    figure = Figure(figsize=(15, 8.5), dpi=110)
    FigureCanvasAgg(figure)
    whole = f', all on {everything.sqnr:.1f} dB' if everything else ''
    for bottom, values, title in (
        (0.56, alone, f'SQNR of mask logits, each of {len(own)} quantizers alone on'),
        (0.1, gain, f'gain in SQNR, each of them alone off{whole}'),
    ):
        axes = figure.add_axes((0.045, bottom, 0.575, HEIGHT))
        axes.set_title(title, loc='left')
        worst = draw_bars(axes, values, [colours[groups[p]] for p in paths], highest=values is gain)
        list_worst(figure, bottom + HEIGHT, [(paths[i], float(values[i])) for i in worst])
    axes.set_xlabel('quantizers in the order of the model')
    patches = [Patch(color=colour, label=group) for group, colour in colours.items()]
    figure.legend(handles=patches, loc='lower left', bbox_to_anchor=(0.035, 0), ncols=len(COLOURS), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def plot_roles(path: Path, rows: Sequence['Sensitivity']) -> None:
    """Draw a table of roles and bits, coloured by the lowest SQNR that a quantizer of the role has alone on.

    Args:
        path: PNG file, written atomically.
        rows: of all bits; at least one with a score.
    """
    measured = [row for row in rows if row.enabled]
    roles = list(dict.fromkeys(row.point.role for row in measured))
    widths = sorted({row.bits for row in measured})
    width, height = 3.8 + 1.0 * len(widths), 1.1 + 0.24 * len(roles)
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    edges = dict(left=3.2 / width, right=0.99, top=1 - 0.7 / height, bottom=0.3 / height, wspace=0.05)
    lowest, middle = (np.full((len(roles), len(widths)), math.nan) for _ in range(2))
    counts = []
    for i, role in enumerate(roles):
        of_role = [row for row in measured if row.point.role == role]
        counts.append(len({row.point.path for row in of_role}))
        for j, bits in enumerate(widths):
            if found := [row.enabled.sqnr for row in of_role if row.bits == bits and row.enabled]:
                lowest[i, j], middle[i, j] = min(found), float(np.median(found))
    for axes, values, title in zip(
        figure.subplots(1, 2, sharey=True, gridspec_kw=edges), (lowest, middle), ('worst', 'median'), strict=True
    ):
        draw_cells(axes, values, widths)
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(roles)), [f'{role} ({n})' for role, n in zip(roles, counts, strict=True)], fontsize=7)
    figure.suptitle('SQNR of mask logits in dB, one quantizer alone on: worst and median of each role', fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_cells(axes: Axes, values: np.ndarray, widths: Sequence[int]) -> None:
    """Draw a coloured table: low values dark red, NaN grey.

    Args:
        axes: where to draw.
        values: dB, (roles, widths).
        widths: names of the columns.
    """
    axes.set_facecolor('lightgrey')
    finite = np.where(np.isposinf(values), np.nan, values)
    axes.imshow(finite, cmap='RdYlGn', vmin=0, vmax=50, aspect='auto', alpha=0.75)
    for i, j in np.argwhere(~np.isnan(values)).tolist():
        axes.text(j, i, f'{values[i, j]:.0f}', ha='center', va='center', fontsize=7)
    axes.set_xticks(range(len(widths)), [f'{bits} bit' for bits in widths], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
