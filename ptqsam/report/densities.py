"""Picture of densities: how values are distributed before and after a method has changed them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ptqsam.fileio import atomic_path

if TYPE_CHECKING:
    from ptqsam.hooks.bimodal_integration import Bimodality

# before and after, colour-blind safe (Okabe and Ito)
COLOURS = ('#0072B2', '#D55E00')


def plot_densities(path: Path, panels: Mapping[str, Sequence['Bimodality']]) -> None:
    """Draw one panel per tensor, peaks marked.

    Args:
        path: PNG file, written atomically.
        panels: title -> its density, and the density after the change where there is one; at least one panel.
    """
    figure = Figure(figsize=(9, 2.6 * len(panels)), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, (title, densities) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        axes.set_title(title, loc='left', fontsize=10)
        names = ('before', 'after') if len(densities) > 1 else ('unchanged',)
        for found, name, colour in zip(densities, names, COLOURS, strict=False):
            axes.fill_between(found.grid, found.density, color=colour, alpha=0.25, linewidth=0)
            axes.plot(found.grid, found.density, color=colour, linewidth=1.2, label=name)
            peaks = list(found.peaks)
            axes.plot(found.grid[peaks], found.density[peaks], 'v', color=colour)
        axes.axhline(densities[0].threshold, color='grey', linewidth=0.8, linestyle=':', label='least height of a peak')
        axes.set(ylabel='density', ylim=(0, None))
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
