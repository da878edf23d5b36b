"""The grid as Markdown and as LaTeX."""

import re

from ptqsam.report.grid import Cell, Grid, Row

_LATEX = {
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    '±': r'$\pm$',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
    '|': r'\textbar{}',
    '"': "''",
    **{sign: f'\\{sign}' for sign in '&%$#_{}'},
}


def markdown(grid: Grid) -> str:
    """The table as Markdown, with its notes below.

    Args:
        grid: the table.
    """
    heads = [
        f'{sam} {column}'.strip() if n == 0 else column for sam, group in grid.sams for n, column in enumerate(group)
    ]
    lines = [('detector', 'recipe', *heads), ('---',) * (len(heads) + 2)]
    for row in grid.rows:
        label = f'{row.label} [{row.source}]' if row.source else row.label
        lines.append((row.detector, label, *map(_markdown_cell, row.cells)))
    table = '\n'.join(f'| {" | ".join(map(_markdown_text, line))} |' for line in lines)
    return '\n'.join((table, '', *(f'- {note}' for note in grid.notes)))


def latex(grid: Grid, caption: str) -> str:
    r"""The table as LaTeX, in a `table*` for a text with `\usepackage{booktabs}`.

    Args:
        grid: the table.
        caption: plain text.
    """
    count = sum(len(group) for _, group in grid.sams)
    spans, rules, first = [], [], 3
    for sam, group in grid.sams:
        spans.append(f'\\multicolumn{{{len(group)}}}{{c}}{{{latex_text(sam)}}}')
        rules.append(f'\\cmidrule(lr){{{first}-{first + len(group) - 1}}}')
        first += len(group)
    heads = [latex_text(column) for _, group in grid.sams for column in group]
    body = [
        f'& & {" & ".join(spans)} \\\\',
        ' '.join(rules),
        f'detector & recipe & {" & ".join(heads)} \\\\',
    ]
    for detector, rows in grid.detectors:
        body.append(r'\midrule')
        for number, row in enumerate(rows):
            cells = (latex_text(detector if number == 0 else ''), _latex_label(row), *map(_latex_cell, row.cells))
            body.append(f'{" & ".join(cells)} \\\\')
    notes = [f'  {latex_text(note)}\\par' for note in grid.notes]
    lines = (
        r'% \usepackage{booktabs}',
        r'\begin{table*}',
        r'\centering\small',
        f'\\caption{{{latex_text(caption)}}}',
        f'\\begin{{tabular}}{{ll{"r" * count}}}',
        r'\toprule',
        *body,
        r'\bottomrule',
        r'\end{tabular}',
        r'\par\medskip',
        r'\begin{minipage}{\linewidth}\footnotesize',
        *notes,
        r'\end{minipage}',
        r'\end{table*}',
    )
    return '\n'.join(lines)


def latex_text(text: str) -> str:
    """Plain text with LaTeX's special characters escaped; what its fonts lack becomes a question mark."""
    escaped = ''.join(_LATEX.get(sign, sign) for sign in ' '.join(text.split()))
    return escaped.encode('ascii', 'replace').decode()


def _markdown_cell(cell: Cell) -> str:
    text = cell.number + (f' ({cell.loss})' if cell.loss else '') + (f' [{cell.stamp}]' if cell.stamp else '')
    return f'**{text}**' if cell.best else text


def _markdown_text(text: str) -> str:
    """Text that cannot end its cell."""
    return re.sub(r'([|<])', r'\\\1', text)


def _latex_label(row: Row) -> str:
    return latex_text(row.label) + (f'~[{row.source}]' if row.source else '')


def _latex_cell(cell: Cell) -> str:
    number = latex_text(cell.number)
    loss = f' {{\\scriptsize(${cell.loss}$)}}' if cell.loss else ''
    stamp = f'\\textsuperscript{{{cell.stamp}}}' if cell.stamp else ''
    return (f'\\textbf{{{number}}}' if cell.best else number) + loss + stamp
