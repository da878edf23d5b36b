"""Sections from the files of `tools/analyze.py`."""

from pathlib import Path
from typing import Any

from ptqsam.report.page.artefacts import column, csv_table, number, read_csv, read_json
from ptqsam.report.page.blocks import Block, Small
from ptqsam.report.page.charts import channels, histogram, profile, ranked
from ptqsam.report.page.pictures import Album

# worst quantizers that are named, histograms and grouped inputs that are drawn
NAMED, HISTOGRAMS, GROUPED = 25, 24, 4


def sensitivity(path: Path, _: Album) -> list[Block]:
    """What each quantizer alone does to the masks: the worst by name, and all in order of execution."""
    rows = read_csv(path, 'path', 'kind', 'enabled_sqnr_db', 'enabled_iou', 'disabled_iou')
    blocks: list[Block] = []
    # several bit widths were tried; those of the recipe are the ones that were also switched off alone
    own = [row for row in rows if row['disabled_iou']]
    for kind, title in (('act', 'activation'), ('weight', 'weight')):
        mine = [row for row in own if row['kind'] == kind]
        if not mine:
            continue
        lost = [(row['path'], 100 * (1 - iou)) for row in mine if (iou := number(row['enabled_iou'])) is not None]
        worst = sorted((item for item in lost if item[1] > 0), key=lambda item: -item[1])[:NAMED]
        caption = f'mask IoU lost with one {title} quantizer on: the {len(worst)} that cost most'
        names, losses = [name for name, _ in worst], [loss for _, loss in worst]
        blocks.append(ranked(caption, names, losses, '%', [row['path'] for row in mine]))
        caption = f'SQNR of the mask logits with one {title} quantizer on, in order of execution, the lowest numbered'
        blocks.append(profile(caption, [row['path'] for row in mine], column(mine, 'enabled_sqnr_db'), 'dB'))
    return [*blocks, csv_table('All quantizers and bit widths', rows)]


def histograms(path: Path, _: Album) -> list[Block]:
    """One point of each role."""
    content: dict[str, Any] = read_json(path)
    shown: dict[str, str] = {}
    for point, found in content.items():
        shown.setdefault(found['role'], point)
    charts = []
    for role, point in list(shown.items())[:HISTOGRAMS]:
        found = content[point]
        caption = f'{role}: {point}, {found["quantizer"]} {found["bits"]} bit'
        charts.append(histogram(caption, found['edges'], found['counts'], found['levels']))
    return [Small(tuple(charts))]


def statistics(path: Path, _: Album) -> list[Block]:
    """How activations and weights are distributed."""
    rows = read_csv(path, 'path', 'kind', 'channel_spread')
    mine = [row for row in rows if row['kind'] == 'act' and number(row['channel_spread'])]
    blocks: list[Block] = []
    if mine:
        caption = 'spread between channels of each activation, in order of execution, the highest numbered'
        names, spreads = [row['path'] for row in mine], column(mine, 'channel_spread')
        blocks.append(profile(caption, names, spreads, base=1.0, log=True))
    return [*blocks, csv_table('All activations and weights', rows)]


def groups(path: Path, _: Album) -> list[Block]:
    """Channels of the grouped inputs whose groups save most."""
    content: dict[str, Any] = read_json(path)
    gains = {name: _saved(found) for name, found in content.items()}
    chosen = sorted(content, key=lambda name: -gains[name])[:GROUPED]
    return [
        channels(
            f'{name}: {len(found["group_lo"])} groups of {len(found["lo"])} channels; the mean range is '
            f'{100 * (1 - gains[name]):.0f} % as wide as the shared one',
            found['lo'],
            found['hi'],
            [int(number) for number in found['group']],
            list(zip(found['group_lo'], found['group_hi'], strict=True)),
        )
        for name, found in ((name, content[name]) for name in chosen)
    ]


def _saved(found: dict[str, Any]) -> float:
    """Share of the common range that a channel's group does without, mean over channels."""
    whole = max(found['hi']) - min(found['lo'])
    widths = [found['group_hi'][int(g)] - found['group_lo'][int(g)] for g in found['group']]
    return 1 - sum(widths) / len(widths) / whole if whole > 0 else 0.0
