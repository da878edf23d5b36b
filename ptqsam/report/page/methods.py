"""What a run has left, file by file, as charts and tables."""

from pathlib import Path

import yaml

from ptqsam.report.page.artefacts import column, csv_table, read_csv, read_json
from ptqsam.report.page.blocks import Block, Line, Table
from ptqsam.report.page.charts import before_after, profile
from ptqsam.report.page.pictures import Album


def recipe(path: Path, _: Album) -> list[Block]:
    """The recipe of a packed checkpoint."""
    content = read_json(path)
    text = yaml.safe_dump(content['recipe'], sort_keys=False, default_flow_style=None, width=110)
    calibration = content['recipe']['calibration']
    line = f'{content["recipe"]["algorithm"]}, calibrated on {calibration["num_images"]} images'
    return [Line(line, text, folded=True)]


def masks(path: Path, album: Album) -> list[Block]:
    """Pictures, worst first."""
    entries, blocks = read_json(path), list[Block]()
    for entry in entries[: album.most]:
        iou, worst = entry['fp_iou'], entry['worst']
        text = f'{entry["image"]}: {entry["objects"]} objects'
        text += '' if iou is None else f', mean IoU with FP {iou:.2f}, lowest of an object {worst:.2f}'
        # the name only: a list from elsewhere must not read other files
        if (picture := album.add(path.parent / Path(str(entry['file'])).name, text)) is not None:
            blocks.append(picture)
    if more := len(entries) - len(blocks):
        blocks.append(Line(f'{more} more in {path.parent.name}/, left out for the size of this page.'))
    return blocks


def quantizers(path: Path, _: Album) -> list[Block]:
    """SQNR of every quantizer, and the table."""
    rows = read_csv(path, 'path', 'role', 'kind', 'quantizer', 'bits', 'observer', 'rule', 'sqnr_db', 'cosine')
    blocks: list[Block] = []
    for kind, title in (('act', 'activation'), ('weight', 'weight')):
        mine = [row for row in rows if row['kind'] == kind]
        if mine:
            caption = f'SQNR of {len(mine)} {title} quantizers in order of execution, the lowest numbered'
            blocks.append(profile(caption, [row['path'] for row in mine], column(mine, 'sqnr_db'), 'dB'))
    blocks.append(csv_table('All quantizers', rows))
    return blocks


def bimodality(path: Path, album: Album) -> list[Block]:
    """Decisions of BIG and the densities before and after."""
    attentions = read_json(path)['attentions']
    rows = tuple(
        (
            name,
            'two peaks, integrated' if found['bimodal'] else 'not bimodal',
            ', '.join(f'{peak:.2f}' for peak in found['peaks']),
            float(found['flipped']),
            float(found['channels']),
        )
        for name, found in attentions.items()
    )
    heads = ('attention', 'keys', 'peaks at', 'channels with flipped sign', 'of')
    blocks: list[Block] = [Table('token-to-image attentions', heads, rows)]
    if (drawn := path.with_suffix('.png')).is_file():
        caption = 'density of the keys before and, where bimodal, after integration; triangles: peaks'
        picture = album.add(drawn, caption)
        blocks.append(picture or Line(f'{drawn.name} is left out for the size of this page.'))
    return blocks


def reconstruction(path: Path, _: Album) -> list[Block]:
    """Gain of every unit."""
    rows = read_csv(path, 'unit', 'loss_nearest', 'loss_reconstructed', 'ratio', 'flipped', 'unsettled')
    units, ratios = [row['unit'] for row in rows], column(rows, 'ratio')
    gained = sum(ratio is not None and ratio < 1 for ratio in ratios)
    caption = f'loss after reconstruction over loss of nearest rounding; {gained} of {len(rows)} units gained'
    return [profile(caption, units, ratios, base=1.0, log=True), csv_table('All units', rows)]


def conditions(path: Path, _: Album) -> list[Block]:
    """Condition numbers and output SQNR before and after."""
    names = ('condition_before', 'condition_after', 'sqnr_before', 'sqnr_after', 'sqnr_own')
    rows = read_csv(path, 'layer', *names)
    layers = [row['layer'] for row in rows]
    before, after, sqnr, sqnr_after, own = (column(rows, name) for name in names)
    outputs = {
        'before': sqnr,
        'after, against the float output': sqnr_after,
        "after, against the new weight's own": own,
    }
    changed = sum(value is not None for value in after)
    return [
        before_after(
            f'condition number of {len(rows)} weights, {changed} of them changed',
            layers,
            {'before': before, 'after': after},
            log=True,
        ),
        before_after('SQNR of the output under input quantization, dB', layers, outputs),
        csv_table('All layers', rows),
    ]


def clipping(path: Path, _: Album) -> list[Block]:
    """Ranges and focus overlap, with the observer's ranges and with those of PCC."""
    ends = ('observer_lo', 'observer_hi', 'lo', 'hi')
    overlaps = ('attention_overlap_observer', 'attention_overlap')
    rows = read_csv(path, 'quantizer', *ends, *overlaps, 'overlap_observer', 'overlap')
    names = [row['quantizer'] for row in rows]
    observer_lo, observer_hi, lo, hi = (column(rows, name) for name in ends)
    widths = {
        'range of the observer': _differences(observer_hi, observer_lo),
        'range of PCC': _differences(hi, lo),
    }
    focus = {label: column(rows, name) for label, name in zip(('before', 'after'), overlaps, strict=True)}
    return [
        before_after('width of the range of each quantizer', names, widths, log=True),
        before_after(
            'focus overlap of the attention with the float one (1: the same focus), all its clipped quantizers on',
            names,
            focus,
        ),
        csv_table('All clipped quantizers', rows),
    ]


def _differences(a: list[float | None], b: list[float | None]) -> list[float | None]:
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]
