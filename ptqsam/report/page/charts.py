"""The charts of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from markupsafe import Markup

from ptqsam.report.page.svg import COLOURS, Drawing, Scale, scale_of, short
from ptqsam.report.plots import module_groups

WIDTH = 1000.0
# pixels around the plots
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 14.0, 26.0
# colours of values that are compared
SERIES = ('c0', 'c5', 'c2')
# of many bars those that are numbered and named
WORST = 8
# letters of a path that fit beside a bar
NAME = 74
# of a histogram; levels that are drawn over its whole height
BINS, MOST_LINES = 128, 40

Values = Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A drawing with what explains it.

    Attributes:
        svg: the drawing.
        caption: what it shows.
        legend: style and meaning of each colour.
        named: what the numbers in the drawing stand for, from 1 on.
    """

    svg: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()
    named: tuple[str, ...] = ()
    kind: str = 'chart'


def profile(
    caption: str, names: Sequence[str], values: Values, unit: str = '', base: float = 0.0, log: bool = False
) -> Chart:
    """A bar per layer in order of execution, coloured by the part of the model; the lowest ones are numbered and named.

    Args:
        caption: what it shows.
        names: paths.
        values: of each; None: not known; infinite ones are hollow, at full height.
        unit: of the values.
        base: where bars begin.
        log: logarithmic axis; the highest ones are numbered then, as the values are those that should be low.
    """
    parts = part_styles(names)
    drawing = Drawing(WIDTH, 240, caption)
    finite = [v for v in values if v is not None and math.isfinite(v)]
    y = scale_of(finite, drawing.height - TOP, TOP + 12, log, include=[base])
    drawing.y_axis(y, LEFT, WIDTH - RIGHT)
    step = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
    known = [i for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    if any(v is not None and math.isinf(v) for v in values):
        caption += '; hollow: infinite'
    worst = sorted(known, key=lambda i: (-1 if log else 1) * (values[i] or 0.0))[:WORST]
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None or math.isnan(value):
            continue
        place = y(value) if math.isfinite(value) else y.end
        tip, style = f'{name}: {short(value)} {unit}'.strip(), parts[name][1]
        if math.isinf(value):
            style = f'{style} s{style[1:]} hollow'
        drawing.rect(LEFT + i * step, min(place, y(base)), step * 0.82, abs(place - y(base)), style, tip)
    # in front of all bars
    for rank, i in enumerate(worst, start=1):
        drawing.text(LEFT + (i + 0.41) * step, min(y(values[i] or 0.0), y(base)) - 3, str(rank), 'rank mid')
    drawing.line(LEFT, y(base), WIDTH - RIGHT, y(base), 'axis')
    named = tuple(f'{names[i]}: {short(values[i] or 0.0)} {unit}'.strip() for i in worst)
    return Chart(drawing.svg(), caption, legend_of(parts), named)


def before_after(
    caption: str, names: Sequence[str], series: Mapping[str, Values], log: bool = False, line: float | None = None
) -> Chart:
    """A dot per layer and series, those of a layer joined.

    Args:
        caption: what it shows.
        names: paths, in order of execution.
        series: what it is -> value of each layer; None: there is none.
        log: logarithmic axis; values that are not positive or infinite are drawn at its ends.
        line: a value that is marked.
    """
    drawing = Drawing(WIDTH, 250, caption)
    values = [v for column in series.values() for v in column if v is not None]
    y = scale_of(values, drawing.height - BOTTOM, TOP, log, include=[] if line is None else [line])
    drawing.y_axis(y, LEFT, WIDTH - RIGHT)
    if line is not None:
        drawing.line(LEFT, y(line), WIDTH - RIGHT, y(line), 'dash')
    step = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
    mark_parts(drawing, names, step)
    radius = min(max(step * 0.3, 2.0), 4.5)
    for i, name in enumerate(names):
        x = LEFT + (i + 0.5) * step
        there = [column[i] for column in series.values()]
        places = [y(v) for v in there if v is not None and not math.isnan(v)]
        if len(places) > 1:
            drawing.line(x, min(places), x, max(places), 'link')
        for number, (label, column) in enumerate(series.items()):
            value = column[i]
            if value is not None and not math.isnan(value):
                # the first is larger, so that it shows behind an equal one
                size = radius if number else radius + 1.5
                drawing.dot(x, y(value), size, SERIES[number], f'{name}, {label}: {short(value)}')
    legend = tuple(zip(SERIES, series, strict=False))
    return Chart(drawing.svg(), caption, legend)


def part_styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Path -> the part of the model that it belongs to, and that part's style.

    Args:
        names: paths, in order of execution.
    """
    # of a path within it: the names of units are modules themselves
    groups = module_groups([f'{name}.' for name in names])
    styles = {group: f'c{n % COLOURS}' for n, group in enumerate(dict.fromkeys(groups.values()))}
    return {name: (groups[f'{name}.'], styles[groups[f'{name}.']]) for name in names}


def legend_of(parts: Mapping[str, tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Style and name of each part of the model."""
    return tuple(dict.fromkeys((style, group) for group, style in parts.values()))


def mark_parts(drawing: Drawing, names: Sequence[str], step: float) -> None:
    """Lines between parts of the model along the horizontal axis, and their names below as far as there is room.

    Args:
        drawing: drawn on.
        names: paths, in order of execution.
        step: pixels of each.
    """
    parts = part_styles(names)
    start = 0
    for group, members in groupby(parts[name][0] for name in names):
        count = len(list(members))
        if start:
            drawing.line(LEFT + start * step, TOP, LEFT + start * step, drawing.height - BOTTOM, 'grid')
        # about 6 pixels per letter
        if 6 * len(group) < count * step:
            drawing.text(LEFT + (start + count / 2) * step, drawing.height - 8, group, 'tick mid')
        start += count


def ranked(caption: str, names: Sequence[str], values: Sequence[float], unit: str, among: Sequence[str]) -> Chart:
    """Horizontal bars with their names, in the given order, in the colours of `profile`.

    Args:
        caption: what it shows.
        names: paths.
        values: of each, not negative.
        unit: of the values.
        among: all paths, in order of execution.
    """
    parts = part_styles(among)
    row, names_end = 19.0, 480.0
    drawing = Drawing(WIDTH, TOP + row * len(names) + BOTTOM, caption)
    x = scale_of(values, names_end, WIDTH - 70, include=[0.0])
    drawing.x_axis(x, TOP, TOP + row * len(names))
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = TOP + number * row
        drawing.text(names_end - 8, y + 14, name if len(name) <= NAME else f'…{name[1 - NAME :]}', 'path end')
        tip = f'{name}: {short(value)} {unit}'
        drawing.rect(x(0.0), y + 3, x(value) - x(0.0), row - 6, parts[name][1], tip)
        drawing.text(x(value) + 5, y + 14, f'{short(round(value, 2))} {unit}', 'tick')
    drawing.line(x(0.0), TOP, x(0.0), TOP + row * len(names), 'axis')
    return Chart(drawing.svg(), caption, legend_of(parts))


@dataclass(frozen=True)
class Point:
    """A run in a chart of accuracy against size."""

    series: str
    size: float
    value: float
    label: str


def accuracy_by_size(caption: str, points: Sequence[Point], whole: float | None) -> Chart:
    """mAP against packed size, a line per recipe, the float model as a horizontal line.

    Args:
        caption: what it shows.
        points: runs.
        whole: mAP of the float model in percent, None if it is not known.
    """
    drawing = Drawing(WIDTH, 360, caption)
    bottom, right = drawing.height - 44, WIDTH - 70
    x = scale_of([point.size for point in points], LEFT, right)
    y = scale_of([point.value for point in points], bottom, TOP, include=[0.0] if whole is None else [0.0, whole])
    y = Scale(y.low, y.high + 0.05 * (y.high - y.low), y.start, y.end)
    drawing.x_axis(x, TOP, bottom)
    drawing.y_axis(y, LEFT, right)
    drawing.text((LEFT + right) / 2, drawing.height - 6, 'packed size, MB', 'tick mid')
    drawing.text(4, TOP - 2, 'mAP', 'tick')
    if whole is not None:
        drawing.line(LEFT, y(whole), right, y(whole), 'dash')
        drawing.text(right + 6, y(whole) + 4, f'FP {whole:.1f}', 'tick')
    names = list(dict.fromkeys(point.series for point in points))
    for number, name in enumerate(names):
        mine = [point for point in points if point.series == name]
        # seeds of a bit width are points of their own; the line goes through their mean
        means = [
            (fmean(p.size for p in mine if p.label == label), fmean(p.value for p in mine if p.label == label))
            for label in dict.fromkeys(point.label for point in mine)
        ]
        drawing.polyline(
            [(x(size), y(value)) for size, value in sorted(means)],
            f'line s{number % COLOURS}' + ' hollow' * (number >= COLOURS),
        )
        for p in mine:
            tip = f'{name} {p.label}: {p.value:.1f} mAP, {p.size:.1f} MB'
            drawing.dot(x(p.size), y(p.value), 5, colour(number), tip)
    # bits have sizes of their own, so a label per size is enough
    for label in dict.fromkeys(point.label for point in points):
        mine = [point for point in points if point.label == label]
        top = max(mine, key=lambda point: point.value)
        drawing.text(x(top.size), y(top.value) - 10, label, 'tick mid')
    return Chart(drawing.svg(), caption, tuple((colour(n), name) for n, name in enumerate(names)))


def colour(number: int) -> str:
    """Style of a series: a colour, and from where they repeat on hollow and dashed."""
    style = f'c{number % COLOURS}'
    return style if number < COLOURS else f'{style} s{number % COLOURS} hollow'


def histogram(caption: str, edges: Sequence[float], counts: Sequence[float], levels: Sequence[float]) -> Chart:
    """A histogram on a logarithmic axis of counts, quantizer levels as lines.

    Args:
        caption: what it shows.
        edges: ascending, one more than counts.
        counts: of each bin.
        levels: of the quantizer; those beyond the edges widen the axis.
    """
    drawing = Drawing(320, 170, caption)
    bottom, right = drawing.height - 24, drawing.width - 8
    edges, counts = fewer(edges, counts)
    low, high = min([edges[0], *levels]), max([edges[-1], *levels])
    x = Scale(low, high if high > low else low + 1, 40, right)
    y = Scale(0.5, max(2.0, *counts) * 1.3, bottom, 10, log=True)
    for tick in y.ticks(3):
        drawing.text(36, y(tick) + 4, short(tick), 'tick end')
    drawing.x_axis(x, bottom, bottom, 4)
    steps = [
        (x(edge), y(count))
        for left, edge2, count in zip(edges, edges[1:], counts, strict=False)
        for edge in (left, edge2)
    ]
    drawing.polygon([(x(edges[0]), bottom), *steps, (x(edges[-1]), bottom)], 'c1 area')
    for level in levels:
        # of many levels short marks, which leave the histogram visible
        drawing.line(x(level), 10 if len(levels) <= MOST_LINES else bottom - 14, x(level), bottom, 'level')
    drawing.line(40, bottom, right, bottom, 'axis')
    return Chart(drawing.svg(), caption)


def fewer(edges: Sequence[float], counts: Sequence[float]) -> tuple[list[float], list[float]]:
    """A histogram with at most `BINS` bins, neighbours joined."""
    size = -(-len(counts) // BINS)
    joined = [sum(counts[start : start + size]) for start in range(0, len(counts), size)]
    return [*edges[: len(counts) : size], edges[len(counts)]], joined


def channels(
    caption: str, lo: Sequence[float], hi: Sequence[float], group: Sequence[int], bounds: Sequence[tuple[float, float]]
) -> Chart:
    """Extremes of each channel, ordered by group, in front of the range of its group.

    Args:
        caption: what it shows.
        lo: smallest value of each channel.
        hi: largest.
        group: number of each channel's group.
        bounds: range of each group.
    """
    order = sorted(range(len(lo)), key=lambda c: (bounds[group[c]][1] - bounds[group[c]][0], group[c], hi[c] - lo[c]))
    drawing = Drawing(WIDTH, 220, caption)
    ends = [*lo, *hi, *(end for bound in bounds for end in bound)]
    y = scale_of(ends, drawing.height - TOP, TOP)
    drawing.y_axis(y, LEFT, WIDTH - RIGHT)
    step = (WIDTH - LEFT - RIGHT) / max(len(order), 1)
    start = 0
    for number in dict.fromkeys(group[c] for c in order):
        count = sum(1 for c in order if group[c] == number)
        low, high = bounds[number]
        tip = f'group {number}: {count} channels, range {short(low)} to {short(high)}'
        place = LEFT + start * step
        drawing.rect(place, y(high), count * step, y(low) - y(high), f'c{number % COLOURS} band', tip)
        start += count
    for place, c in enumerate(order):
        x = LEFT + (place + 0.5) * step
        drawing.line(x, y(lo[c]), x, y(hi[c]), f's{group[c] % COLOURS} thin')
    for end in (min(lo), max(hi)):
        drawing.line(LEFT, y(end), WIDTH - RIGHT, y(end), 'dash')
    return Chart(drawing.svg(), caption)


def stages(caption: str, rows: Sequence[tuple[str, Mapping[str, float]]]) -> Chart:
    """Time of each stage as stacked horizontal bars.

    Args:
        caption: what it shows.
        rows: name of a run, and seconds of each of its stages.
    """
    names = list(dict.fromkeys(stage for _, seconds in rows for stage in seconds))
    row, left = 22.0, 250.0
    drawing = Drawing(WIDTH, TOP + row * len(rows) + BOTTOM, caption)
    totals = [sum(seconds.values()) for _, seconds in rows]
    x = Scale(0.0, max(totals) or 1.0, left, WIDTH - 70)
    drawing.x_axis(x, TOP, TOP + row * len(rows))
    for number, (name, seconds) in enumerate(rows):
        y, done = TOP + row * number, 0.0
        drawing.text(left - 8, y + 15, name if len(name) < 40 else f'…{name[-38:]}', 'path end')
        for stage, time in seconds.items():
            style = f'c{names.index(stage) % COLOURS}'
            drawing.rect(x(done), y + 3, x(done + time) - x(done), row - 6, style, f'{name}, {stage}: {time:.1f} s')
            done += time
        drawing.text(x(done) + 5, y + 15, f'{done:.0f} s', 'tick')
    return Chart(drawing.svg(), caption, tuple((f'c{n % COLOURS}', name) for n, name in enumerate(names)))
