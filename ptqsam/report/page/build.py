"""From runs to the HTML of the page."""

import base64
import hashlib
import platform
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup

from ptqsam import __version__
from ptqsam.progress import progress
from ptqsam.report.grid import (
    Grid,
    bits_label,
    build_grid,
    metric,
    option_text,
)
from ptqsam.report.grid_text import latex, markdown
from ptqsam.report.page.blocks import Line, Section, Table, Value
from ptqsam.report.page.charts import Chart, Point, accuracy_by_size, stages
from ptqsam.report.page.pictures import Album
from ptqsam.report.page.sections import run_sections
from ptqsam.report.published import Source
from ptqsam.sweep.records import Record

HERE = Path(__file__).parent
# bytes of all pictures, and of all that is said about single runs, with them; more is slow in a browser
PICTURES, DETAILS = 24 << 20, 40 << 20
# of one run and of each run of a sweep: pictures of masks
MOST_ALONE, MOST_TOGETHER = 12, 4
# runs whose time is drawn
TIMED = 60


@dataclass(frozen=True)
class Run:
    """A run, what it came to in a line, and the sections about it, also as HTML."""

    record: Record
    anchor: str
    line: str
    sections: list[Section]
    html: Markup


def build_page(
    title: str, records: Sequence[Record], published: Sequence[Source], command: str, sources: Sequence[tuple[str, str]]
) -> str:
    """The page.

    Args:
        title: of the page.
        records: one run, or the cells of a sweep.
        published: results to stand below ours.
        command: that makes this page.
        sources: name and text of files to show, such as the YAML of the sweep.
    """
    alone = len(records) == 1
    album = Album(PICTURES, MOST_ALONE if alone else MOST_TOGETHER)
    grid = build_grid(records, published)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = describe_runs(records, album, environment)
    script = (HERE / 'page.js').read_text(encoding='utf-8')
    return environment.get_template('page.html').render(
        title=title,
        style=Markup((HERE / 'page.css').read_text(encoding='utf-8')),
        script=Markup(script),
        # nothing but our own script runs, and nothing is fetched, whatever a page may contain
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        date=datetime.now().astimezone().strftime('%Y-%m-%d %H:%M %Z'),
        versions=f'ptqsam {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}',
        states=Counter(record.status for record in records),
        command=command,
        grid=grid,
        texts=(('Markdown', markdown(grid)), ('LaTeX', latex(grid, title))),
        overview=[] if alone else overview(records, grid),
        runs=runs,
        alone=alone,
        left_out=album.left_out,
        sources=sources,
    )


def describe_runs(records: Sequence[Record], album: Album, environment: jinja2.Environment) -> list[Run]:
    """Say what there is to say about each run, until the page is full.

    Args:
        records: the runs.
        album: takes the pictures.
        environment: of the templates.
    """
    render = environment.get_template('blocks.html').module.section  # type: ignore[attr-defined]
    level, runs, left = 2 if len(records) == 1 else 3, [], DETAILS
    for number, record in enumerate(progress(records, 'report', 'run')):
        album.divide(len(records) - number)
        anchor = f'run-{number}'
        sections = run_sections(record, album, anchor) if left > 0 else [full(record, anchor)]
        html = Markup('').join(render(section, level) for section in sections)
        left -= len(html)
        runs.append(Run(record, anchor, run_line(record), sections, html))
    return runs


def full(record: Record, anchor: str) -> Section:
    """What stands in place of the sections about a run for which there is no room."""
    command = shlex.join(['python', 'tools/report.py', str(record.folder)])
    line = Line('Left out for the size of this page; a page of its own is made by', command)
    return Section('Details', '', [line], anchor=f'{anchor}-0')


def overview(records: Sequence[Record], grid: Grid) -> list[Section]:
    """Sections about all runs together."""
    sections = []
    charts = size_charts(records)
    if charts:
        meaning = (
            'Mask mAP in percent against the size of the packed checkpoint (10⁶ bytes); a line joins the bit widths '
        )
        meaning += 'of a recipe. Runs with published defects write no checkpoint, so they are not here.'
        sections.append(Section('Accuracy against size', meaning, list(charts), 'size'))
    meaning = 'Every run; sort by a column, or filter. Time is wall time of all attempts, memory the peak of the run.'
    sections.append(Section('All runs', meaning, [runs_table(records)], 'all'))
    timed = [(r.name, r.result['seconds']) for r in records if r.result and r.result.get('seconds')]
    if timed:
        caption = f'seconds of each stage of {"the first " if len(timed) > TIMED else ""}{min(len(timed), TIMED)} runs'
        meaning = 'Where the time went. Work that runs share (float model, calibration) counts for the run that did it.'
        sections.append(Section('Time', meaning, [stages(caption, timed[:TIMED])], 'time'))
    return sections


def size_charts(records: Sequence[Record]) -> list[Chart]:
    """A chart per pipeline that has packed checkpoints."""
    charts = []
    for model in dict.fromkeys(record.model for record in records):
        mine = [record for record in records if record.model == model]
        points = []
        for record in mine:
            value, size = metric(record, 'quant'), ((record.result or {}).get('size_mb') or {}).get('packed')
            if value is not None and size:
                options = [option_text(key, option) for key, option in sorted(record.options.items())]
                points.append(Point(', '.join((record.recipe, *options)), size, value, bits_label(record.bits)))
        if points:
            # pipeline options may make it several
            wholes = {value for record in mine if (value := metric(record, 'fp')) is not None}
            whole = wholes.pop() if len(wholes) == 1 else None
            full = next((r.result['size_mb']['fp'] for r in mine if r.result and r.result['size_mb'].get('fp')), None)
            caption = f'{model}: mAP against packed size' + (f'; the float model has {full:.1f} MB' if full else '')
            charts.append(accuracy_by_size(caption, points, whole))
    return charts


def runs_table(records: Sequence[Record]) -> Table:
    """A row per run."""
    rows: list[tuple[Value, ...]] = []
    heads = ('run', 'bits', 'seed', 'status', 'mAP', 'FP', 'MB', 'minutes', 'GB', 'compat', 'host')
    for record in records:
        result = record.result or {}
        memory = result.get('peak_memory_mb')
        rows.append(
            (
                ' '.join((record.name, *(option_text(key, value) for key, value in sorted(record.options.items())))),
                bits_label(record.bits),
                float(record.seed),
                record.status,
                metric(record, 'quant'),
                metric(record, 'fp'),
                (result.get('size_mb') or {}).get('packed'),
                None if record.seconds is None else record.seconds / 60,
                None if memory is None else memory / 1000,
                ', '.join(result.get('compat', [])),
                record.host,
            )
        )
    return Table('All runs', heads, tuple(rows))


def run_line(record: Record) -> str:
    """What a run came to, in a line."""
    value, whole = metric(record, 'quant'), metric(record, 'fp')
    if value is None:
        return ': '.join(filter(None, (record.status, record.error)))
    loss = '' if whole is None else f' ({value - whole:+.1f} against FP)'
    return f'{value:.1f} mAP{loss}, {bits_label(record.bits)}, seed {record.seed}'
