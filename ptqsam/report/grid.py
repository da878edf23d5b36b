"""The table of a grid of runs, as `exp/run_grid.sh` leaves them: `python -m ptqsam.report.grid FOLDER`."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ptqsam.errors import AssetError, ConfigError, PTQSAMError

METRIC = 'segm_mAP'
# in the order of the papers' tables
SAMS = ('mobile-sam', 'sam-vit-b', 'sam-vit-l', 'sam-vit-h')
DETECTORS = ('faster-rcnn_r50', 'yolox-l', 'hdetr_r50', 'dino_focalnet-l')


@dataclass(frozen=True)
class Cell:
    """One run of a grid, finished or not.

    Attributes:
        detector: its name, and that of the pipeline's variant.
        sam: its name.
        recipe: its name without bits.
        bits: `w4a4`; empty where the recipe's name has none.
        name: folder of the run, below that of the grid.
        result: content of `result.json`, None while there is none.
        error: why the run failed, one line; empty if it did not.
        options: options of the tool that the run was started with.
    """

    detector: str
    sam: str
    recipe: str
    bits: str
    name: str
    result: dict[str, Any] | None = None
    error: str = ''
    options: str = ''

    @property
    def compat(self) -> tuple[str, ...]:
        """Published defects that were switched on."""
        return tuple(self.result['compat']) if self.result else ()

    def metric(self, which: str) -> float | None:
        """mAP in percent of the model `fp` or `quant`, None if it is not known."""
        metrics = self.result['metrics'][which] if self.result else None
        return metrics[METRIC] * 100 if metrics else None


def read_cells(folder: Path) -> list[Cell]:
    """Read what the runs of a grid have left.

    Args:
        folder: holds PIPELINE/RECIPE_BITS/, each with `result.json`, or `error.txt`, or neither yet.

    Returns:
        The runs, in the order of the papers' tables.

    Raises:
        ConfigError: no such folder, or no run in it.
        AssetError: a `result.json` that `tools/test_quant.py` has not written.
    """
    if not folder.is_dir():
        raise ConfigError(f'{folder}: no such folder; name the --work-dir of exp/run_grid.sh')
    left = ('result.json', 'options.txt')
    runs = [path for path in folder.glob('*/*') if any((path / name).is_file() for name in left)]
    if not runs:
        raise ConfigError(f'{folder}: no run of exp/run_grid.sh in it')
    cells = [_read_cell(path) for path in runs]
    return sorted(
        cells, key=lambda c: (_rank(DETECTORS, c.detector), c.recipe, _rank(SAMS, c.sam), _widths(c.bits), c.bits)
    )


def grid_table(cells: Sequence[Cell]) -> str:
    """A grid as Markdown: detectors and recipes down, SAMs and bits across, mAP in percent.

    Args:
        cells: the runs, in order.

    Returns:
        The table: mAP of the float models, of the quantized ones, and in parentheses what is lost; [1] at a run with
        published defects, which are named below, as are failed runs and the options that the runs had.
    """
    sams = sorted({cell.sam for cell in cells}, key=lambda sam: _rank(SAMS, sam))
    bits = {sam: sorted({cell.bits for cell in cells if cell.sam == sam}, key=_widths) for sam in sams}
    heads = [text for sam in sams for text in (f'{_label(sam)} FP'.strip(), *map(str.upper, bits[sam]))]
    stamps = list(dict.fromkeys(cell.compat for cell in cells if cell.compat))
    lines = [('detector', 'recipe', *heads), ('---',) * (len(heads) + 2)]
    for (detector, recipe), group in groupby(cells, key=lambda cell: (cell.detector, cell.recipe)):
        row = {(cell.sam, cell.bits): cell for cell in group}
        texts = []
        for sam in sams:
            known = [value for (s, _), cell in row.items() if s == sam and (value := cell.metric('fp')) is not None]
            texts.append(f'{known[0]:.1f}' if known else '-')
            texts += [_text(row.get((sam, width)), stamps) for width in bits[sam]]
        lines.append((detector, recipe, *texts))
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return '\n'.join((table, '', *_notes(cells, stamps)))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a folder.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 no such folder or nothing in it, 3 a broken result.
    """
    parser = argparse.ArgumentParser(prog='ptqsam.report.grid', description='Table of the runs of exp/run_grid.sh.')
    parser.add_argument('folder', type=Path, help='its --work-dir')
    try:
        print(grid_table(read_cells(parser.parse_args(argv).folder)))
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    return 0


def _read_cell(path: Path) -> Cell:
    pipeline = re.fullmatch(r'(.+?)_((?:mobile-)?sam[^_]*)(?:_(.+))?', path.parent.name)
    detector, sam, variant = pipeline.groups() if pipeline else (path.parent.name, '', None)
    recipe, bits = re.fullmatch(r'(.+?)(?:_(w\d+a\d+))?', path.name).groups('')  # type: ignore[union-attr]
    result = None
    if (path / 'result.json').is_file():
        try:
            result = json.loads((path / 'result.json').read_text(encoding='utf-8'))
            _ = result['metrics']['quant'][METRIC], result['metrics']['fp'], result['compat'], result['images']
        except (ValueError, KeyError, TypeError):
            raise AssetError(
                f'{path / "result.json"}: no result of tools/test_quant.py with {METRIC}; remove it and run again'
            ) from None
    return Cell(
        detector=f'{detector}, {variant}' if variant else detector,
        sam=sam,
        recipe=recipe,
        bits=bits,
        name=f'{path.parent.name}/{path.name}',
        result=result,
        error=_line(path / 'error.txt'),
        options=_line(path / 'options.txt'),
    )


def _line(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace').strip() if path.is_file() else ''


def _text(cell: Cell | None, stamps: list[tuple[str, ...]]) -> str:
    """What stands in the table for a run."""
    if cell is None:
        return '-'
    value, whole = cell.metric('quant'), cell.metric('fp')
    if value is None:
        return 'failed' if cell.error else 'unfinished'
    lost = '' if whole is None else f' ({value - whole:+.1f})'
    return f'{value:.1f}{lost}' + (f' [{stamps.index(cell.compat) + 1}]' if cell.compat else '')


def _notes(cells: Sequence[Cell], stamps: list[tuple[str, ...]]) -> list[str]:
    """Lines below the table."""
    images = sorted({cell.result['images'] for cell in cells if cell.result})
    notes = [f'Mask mAP in percent (difference to FP) on {" or ".join(map(str, images)) or "no"} images.']
    if len(images) > 1:
        notes.append('Not all runs were evaluated on the same images: do not compare them.')
    notes += [f'[{number}] with published defects: {", ".join(stamp)}' for number, stamp in enumerate(stamps, start=1)]
    options = Counter(cell.options for cell in cells)
    if any(options):
        notes += [f'Options of {n} of {len(cells)} runs: {text or "none"}' for text, n in options.items()]
    notes += [f'Failed: {cell.name}: {cell.error}' for cell in cells if cell.error and not cell.result]
    return [f'- {note}' for note in notes]


def _label(sam: str) -> str:
    return {'mobile-sam': 'MobileSAM', **{f'sam-vit-{size}': f'SAM-{size.upper()}' for size in 'blh'}}.get(sam, sam)


def _rank(order: Sequence[str], name: str) -> tuple[int, str]:
    """Place in a known order, then by the alphabet; variants stand behind their detector."""
    first = name.split(',')[0]
    return (order.index(first) if first in order else len(order), name)


def _widths(bits: str) -> tuple[int, ...]:
    """`w4a8` as (4, 8), so that columns stand by width."""
    return tuple(map(int, re.findall(r'\d+', bits)))


if __name__ == '__main__':
    sys.exit(main())
