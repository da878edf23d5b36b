"""An allocation for people: a table beside uniform bits, and a picture of the bits in order of execution."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ptqsam.fileio import atomic_path
from ptqsam.mixed.plan import Plan, uniform_costs
from ptqsam.report.plots import COLOURS, KINDS, module_groups
from ptqsam.report.summary import align


def summary_table(plan: Plan, uniform: Sequence[int], rest: int) -> str:
    """What the allocation takes, beside models with the same bits everywhere, and how often it has which bits.

    Args:
        plan: the allocation.
        uniform: bits of the uniform models.
        rest: bytes of the packed checkpoint beside the weights that are quantized, estimated.

    Returns:
        Two text tables.
    """
    products, bits = plan.products, plan.bits
    losses = plan.uniform | dict(mixed=plan.allocation.loss if plan.uniform else None)
    rows: list[tuple[str, ...]] = [
        ('', 'bits per weight', 'bits per activation', 'weights MB', 'packed MB', 'GBitOps', 'predicted loss')
    ]
    ones = uniform_costs(products, dict(weight=1, act=1))
    sums = {'mixed': plan.allocation.costs}
    sums |= {f'W{b}A{b}': uniform_costs(products, dict(weight=b, act=b)) for b in uniform}
    for name, costs in sums.items():
        averages = [f'{costs[kind] / ones[kind]:.3f}' if ones[kind] else '-' for kind in ('weight', 'act')]
        sizes = [f'{costs["size"] / 1e6:.3f}', f'{(costs["size"] + rest) / 1e6:.1f}', f'{costs["bitops"] / 1e9:.1f}']
        rows.append((name, *averages, *sizes, '-' if (loss := losses.get(name)) is None else f'{loss:.4g}'))
    widths = sorted(set(bits.values()))
    histogram = [('bits', *map(str, widths))]
    for kind, word in KINDS:
        counts = Counter(bits[f.path] for product in products for f in product.factors if f.kind == kind)
        histogram.append((f'{word} quantizers', *(str(counts[width]) for width in widths)))
    return f'{align(rows)}\n\n{align(histogram)}'


def plot_bits(path: Path, plan: Plan, title: str) -> None:
    """Draw the bits of every quantizer as a bar, activations above weights, in order of execution.

    Args:
        path: PNG file, written atomically.
        plan: the allocation.
        title: of the picture.
    """
    bits, factors = plan.bits, [factor for product in plan.products for factor in product.factors]
    groups = module_groups([factor.path for factor in factors])
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(groups.values()))}
    figure = Figure(figsize=(15, 7), dpi=110, layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (kind, word) in zip(figure.subplots(2, 1), KINDS, strict=True):
        paths = [factor.path for factor in factors if factor.kind == kind]
        values = np.array([bits[p] for p in paths])
        sizes = np.array([factor.numel for factor in factors if factor.kind == kind], dtype=float)
        axes.bar(np.arange(len(paths)), values, color=[colours[groups[p]] for p in paths], width=0.85)
        mean = float((values * sizes).sum() / sizes.sum()) if sizes.sum() else math.nan
        axes.axhline(mean, color='black', linewidth=0.8, linestyle=':')
        axes.set_title(f'bits of {len(paths)} {word} quantizers; dotted: {mean:.2f} bits per value', loc='left')
        axes.set(xlim=(-1, max(len(paths), 1)), ylim=(0, 8.5), yticks=range(0, 9, 2), ylabel='bits')
        axes.set_xticks([])
        axes.grid(axis='y', alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    axes.set_xlabel('quantizers in order of execution')
    patches = [Patch(color=colour, label=group) for group, colour in colours.items()]
    figure.legend(handles=patches, loc='outside lower center', ncols=len(COLOURS), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format='png')
