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
KINDS = (('act', 'activations'), ('weight', 'weights'))


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
    figure = Figure(figsize=(15, 8.5), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, width_ratios=(2.1, 1), squeeze=False)
    for (bars, names), (kind, title) in zip(axes, KINDS, strict=True):
        paths = [choice.point.path for choice in choices if choice.point.kind == kind]
        values = np.array([errors[p].sqnr if p in errors else math.nan for p in paths], dtype=float)
        bars.set_title(f'SQNR of {len(paths)} quantized {title}', loc='left')
        worst = draw_bars(bars, values, [colours[groups[p]] for p in paths])
        list_worst(names, [(paths[i], float(values[i])) for i in worst])
    axes[1][0].set_xlabel('quantizer, in order of execution')
    handles = [axes[0][0].bar(0, 0, color=colour, label=group)[0] for group, colour in colours.items()]
    if handles:
        figure.legend(handles=handles, loc='outside lower left', ncols=len(handles), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')


def draw_bars(axes: Axes, values: np.ndarray, colours: Sequence[str]) -> list[int]:
    """Draw one panel and number its lowest bars.

    Args:
        axes: where to draw.
        values: SQNR in dB (n,), possibly infinite or NaN.
        colours: of each bar.

    Returns:
        Indices of the worst quantizers, worst first.
    """
    known = ~np.isnan(values)
    finite = values[np.isfinite(values)]
    top = max(float(finite.max()), 1.0) * 1.12 if len(finite) else 1.0
    heights = np.clip(np.where(known, values, 0.0), LOWEST, top)
    bars = axes.bar(np.arange(len(values)), heights, color=list(colours), width=0.85)
    for i in np.flatnonzero(np.isposinf(values)):
        bars[i].set(hatch='////', fill=False, edgecolor=colours[i], linewidth=0)
    missing = np.flatnonzero(~known)
    axes.plot(missing, np.zeros(len(missing)), 'x', color='grey', markersize=5, clip_on=False)
    worst = [i for i in np.argsort(values, kind='stable').tolist() if known[i] and values[i] < math.inf][:WORST]
    for rank, i in enumerate(worst, 1):
        axes.annotate(
            str(rank), (i, max(heights[i], 0.0)), (0, 1), textcoords='offset points', ha='center', fontsize=9, weight='bold'
        )
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


def list_worst(axes: Axes, worst: Sequence[tuple[str, float]]) -> None:
    """Write the paths and values of the worst quantizers, worst first, with their numbers in the bar plot."""
    axes.set_axis_off()
    axes.set_title('lowest', loc='left', fontsize=10)
    for line, (path, value) in enumerate(worst):
        y = 0.97 - line * 0.095
        axes.text(0.0, y, f'{line + 1}', transform=axes.transAxes, weight='bold', va='top', fontsize=9)
        axes.text(0.13, y, f'{value:.1f} dB', transform=axes.transAxes, ha='right', va='top', fontsize=9)
        axes.text(0.15, y, path, transform=axes.transAxes, va='top', fontsize=9)


def module_groups(paths: Sequence[str]) -> dict[str, str]:
    """Part of the model that each path belongs to: a stage of the image encoder, its neck, the decoder, ...

    Numbered children of the encoder (blocks, layers) are joined to at most four stages of equal size.

    Args:
        paths: dotted paths below SAM.

    Returns:
        Path -> name of the group.
    """
    numbered = {p: m for p in paths if (m := re.match(r'(image_encoder)\.(\w+)\.(\d+)\.', p)) and m[2] != 'neck'}
    counts: dict[str, int] = {}
    for match in numbered.values():
        counts[match[2]] = max(counts.get(match[2], 0), int(match[3]) + 1)
    groups = {}
    for path in paths:
        if match := numbered.get(path):
            size = math.ceil(counts[match[2]] / STAGES)
            first = int(match[3]) // size * size
            last = min(first + size, counts[match[2]]) - 1
            groups[path] = f'encoder {match[2]} {first}' + (f'-{last}' if last > first else '')
        else:
            top, child, *_ = [*path.split('.'), '']
            groups[path] = f'encoder {child}' if top == 'image_encoder' else top.replace('_', ' ')
    return groups
