"""Plot of the error that each quantizer adds."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ptqsam.fileio import atomic_path

if TYPE_CHECKING:
    from ptqsam.evaluation.quantization_error import QuantizationError
    from ptqsam.solver.rules import Choice

WORST = 10
# image encoders of many blocks are coloured in so many stages, as SAM's own ViTs have them between global attentions
STAGES = 4
# dB; a bar below ends here and its value stands in the list, so that one dead quantizer does not flatten the others
LOWEST = -20.0
# colour-blind safe (Okabe and Ito), encoder stages first
COLOURS = ('#0072B2', '#56B4E9', '#009E73', '#F0E442', '#E69F00', '#D55E00', '#CC79A7', '#000000')
KINDS = (('act', 'activation'), ('weight', 'weight'))


def plot_quantization_errors(
    path: Path, choices: Sequence['Choice'], errors: Mapping[str, 'QuantizationError']
) -> None:
    """Draw the SQNR of every quantizer as a bar, activations above weights, in execution order, the worst ones named.

    Args:
        path: PNG file, written atomically.
        choices: quantizers in execution order.
        errors: quantizer path -> error, SQNR in dB. Infinite (exact) gets a hatched bar of full height; missing or
            NaN gets a cross.
    """
    groups = module_groups([choice.point.path for choice in choices])
    # activations outnumber weights; one colour per group over both panels
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(groups.values()))}
    figure = Figure(figsize=(15, 8.5), dpi=110)
    FigureCanvasAgg(figure)
    for (kind, title), bottom in zip(KINDS, (0.56, 0.1), strict=True):
        paths = [choice.point.path for choice in choices if choice.point.kind == kind]
        values = np.array([errors[p].sqnr if p in errors else math.nan for p in paths], dtype=float)
        axes = figure.add_axes((0.045, bottom, 0.575, 0.385))
        axes.set_title(f'SQNR of {len(paths)} {title} quantizers', loc='left')
        worst = draw_bars(axes, values, [colours[groups[p]] for p in paths])
        list_worst(figure, bottom + 0.385, [(paths[i], float(values[i])) for i in worst])
    axes.set_xlabel('quantizers in order of execution')
    patches = [Patch(color=colour, label=group) for group, colour in colours.items()]
    figure.legend(handles=patches, loc='lower left', bbox_to_anchor=(0.035, 0), ncols=len(COLOURS), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_bars(axes: Axes, values: np.ndarray, colours: Sequence[str], highest: bool = False) -> list[int]:
    """Draw one panel and number its worst bars.

    Args:
        axes: where to draw.
        values: SQNR in dB (n,), possibly infinite or NaN.
        colours: of each bar.
        highest: the highest bars are the worst ones. Default False: the lowest.

    Returns:
        Indices of the worst quantizers, worst first.
    """
    known = ~np.isnan(values)
    finite = values[np.isfinite(values)]
    top = max(float(finite.max()), 1.0) * 1.12 if len(finite) else 1.0
    heights = np.clip(np.where(known, values, 0.0), LOWEST, top)
    bars = axes.bar(np.arange(len(values)), heights, color=list(colours), width=0.85)
    for i in np.flatnonzero(np.isposinf(values)).tolist():
        bars[i].set(hatch='////', fill=False, edgecolor=colours[i], linewidth=0.6)
    missing = np.flatnonzero(~known)
    axes.plot(missing, np.zeros(len(missing)), 'x', color='grey', markersize=5, clip_on=False)
    order = np.argsort(-values if highest else values, kind='stable').tolist()
    worst = [i for i in order if known[i] and values[i] < math.inf][:WORST]
    circle = dict(boxstyle='circle,pad=0.15', facecolor='white', linewidth=0.6)
    for rank, i in enumerate(worst, 1):
        tip = (i, max(heights[i], 0.0))
        axes.annotate(f'{rank}', tip, (0, 6), textcoords='offset points', ha='center', fontsize=7, bbox=circle)
    notes = ['hatched: exact (infinite)'] if np.isposinf(values).any() else []
    notes += ['×: not measured'] if len(missing) else []
    axes.set_title(', '.join(notes), loc='right', fontsize=9, color='grey')
    axes.set(ylabel='dB', xlim=(-1, max(len(values), 1)), ylim=(min(0.0, float(heights.min(initial=0.0))), top * 1.06))
    axes.set_xticks([])
    axes.axhline(0, color='black', linewidth=0.8)
    axes.grid(axis='y', alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right', 'bottom']].set_visible(False)
    return worst


def list_worst(figure: Figure, top: float, worst: Sequence[tuple[str, float]]) -> None:
    """Write values and paths of the worst quantizers beside a panel, numbered as their bars are.

    Args:
        figure: where to write.
        top: upper edge of the panel, fraction of the figure's height.
        worst: path and SQNR in dB, worst first.
    """
    for rank, (path, value) in enumerate(worst, 1):
        y = top - rank * 0.0365
        for x, text, align in ((0.645, f'{rank}', 'right'), (0.69, f'{value:.1f} dB', 'right'), (0.697, path, 'left')):
            figure.text(x, y, text, ha=align, fontsize=8, weight='bold' if x == 0.645 else 'normal')


def module_groups(paths: Sequence[str]) -> dict[str, str]:
    """Part of the model that each path belongs to: a stage of the image encoder, its neck, the decoder, ...

    Numbered children of the encoder (blocks, layers) are joined to at most four stages of equal size.

    Args:
        paths: dotted paths below SAM.

    Returns:
        Path -> name of the group.
    """
    numbered = {
        path: (match[1], int(match[2]))
        for path in paths
        if (match := re.match(r'image_encoder\.(?!neck)(\w+)\.(\d+)\.', path))
    }
    counts: dict[str, int] = {}
    for child, number in numbered.values():
        counts[child] = max(counts.get(child, 0), number + 1)
    groups = {}
    for path in paths:
        if path in numbered:
            child, number = numbered[path]
            size = math.ceil(counts[child] / STAGES)
            first = number // size * size
            last = min(first + size, counts[child]) - 1
            groups[path] = f'encoder {child} {first}' + (f'-{last}' if last > first else '')
        else:
            top, _, rest = path.partition('.')
            name = f'encoder {rest.split(".")[0]}' if top == 'image_encoder' else top
            groups[path] = name.replace('_', ' ')
    return groups
