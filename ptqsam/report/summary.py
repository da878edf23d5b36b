"""Tables: the result of a run, its quantizers (CSV), and which rule won where (dry run)."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqsam.fileio import write_text

if TYPE_CHECKING:
    from ptqsam.config import Part
    from ptqsam.evaluation import QuantizationError
    from ptqsam.solver.rules import Choice, RuleBook

COLUMNS = ('path', 'role', 'kind', 'quantizer', 'bits', 'observer', 'rule', 'sqnr_db', 'cosine')


def write_summary(path: Path, choices: 'list[Choice]', errors: 'dict[str, QuantizationError]') -> None:
    """Write one CSV row per quantizer.

    Args:
        path: CSV file, written atomically.
        choices: what the rules decided.
        errors: quantizer path -> error; a quantizer without one gets empty cells.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(COLUMNS)
    for choice in choices:
        point = choice.point
        error = errors.get(point.path)
        numbers = (f'{error.sqnr:.2f}', f'{error.cosine:.6f}') if error else ('', '')
        kinds = (choice.quantizer.type, choice.bits, choice.observer.type, choice.rule)
        table.writerow((point.path, point.role, point.kind, *kinds, *numbers))
    write_text(path, text.getvalue())


def result_table(result: dict[str, Any]) -> str:
    """Result of a run as a text table for people.

    Args:
        result: content of `result.json`.

    Returns:
        One row for the float model (if evaluated) and one for the quantized model.
    """
    metrics = result['metrics']
    names = list(metrics['quant'])
    rows = [('', *names, 'MB')]
    if metrics['fp'] is not None:
        rows.append(('FP32', *(f'{metrics["fp"][name]:.4f}' for name in names), f'{result["size_mb"]["fp"]:.1f}'))
    label = run_label(result['algorithm'], result['bits'], result['quantized'])
    if result['compat']:
        label += f' (compat: {", ".join(result["compat"])})'
    packed = result['size_mb'].get('packed')
    rows.append((label, *(f'{metrics["quant"][name]:.4f}' for name in names), f'{packed:.1f}' if packed else '-'))
    table = align(rows)
    if result['violations']:
        table += f'\nnot honestly quantized: {result["violations"]} violations of the freeze gate, see the log'
    return table


def run_label(algorithm: str, bits: dict[str, Any], quantized: dict[str, Any]) -> str:
    """Algorithm and bit widths, as `mse W4A8`; what stays in floating point has none, as in `softmax_only A4`.

    Parts of the model with other bits follow, as in `mse W4A4 (decoder W6A8)`.

    Args:
        algorithm: name in the recipe.
        bits: `Bits.resolved()` of the recipe.
        quantized: `RuleBook.bit_counts()`.
    """
    parts = [part for part in bits if part not in ('weight', 'act')]
    # what is left of the counts without those of the parts is the whole's
    rest = {
        kind: Counter(quantized[kind]) - sum((Counter(quantized[part][kind]) for part in parts), Counter())
        for kind in ('weight', 'act')
    }
    words = [_widths(bits, rest)]
    if inside := ', '.join(f'{part} {text}' for part in parts if (text := _widths(bits[part], quantized[part]))):
        words.append(f'({inside})')
    places = [(bits, rest), *((bits[part], quantized[part]) for part in parts)]
    if any(set(counts[kind]) - {str(own[kind])} for own, counts in places for kind in ('weight', 'act')):
        words.append('(rules: other bits)')
    return ' '.join(filter(None, (algorithm, *words)))


def part_text(part: 'Part') -> str:
    """A part and the arguments that a recipe gives it, as `CAG groups=8`; of a long list its ends."""
    return ' '.join((part.type, *(f'{name}={_value_text(value)}' for name, value in part.kwargs().items())))


def rule_table(rules: 'RuleBook') -> str:
    """What the rules decided, grouped by role, and how many points each rule matched.

    Args:
        rules: rules after all points were decided.

    Returns:
        A text table.
    """
    groups = Counter((c.point.role, _quantizer_text(c) if c.enabled else 'float', c.rule) for c in rules.choices)
    rows = [('role', 'quantizer', 'count', 'decided by')]
    rows += [(role, what, str(count), rule) for (role, what, rule), count in groups.items()]
    lines = [align(rows), f'{len(rules.enabled)} of {len(rules.choices)} points are quantized']
    lines += [f'{name}: matches {count}' for name, count in rules.counts()]
    return '\n'.join(lines)


def align(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text; the first column is left-aligned, numbers are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(_is_number(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if number else cell.ljust(w) for cell, w, number in zip(row, widths, numeric, strict=True)
        ]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


def _widths(bits: dict[str, Any], counts: dict[str, Any]) -> str:
    """Bit widths of what is quantized, as `W4A8`."""
    return ''.join(letter + str(bits[kind]) for letter, kind in (('W', 'weight'), ('A', 'act')) if counts[kind])


def _quantizer_text(choice: 'Choice') -> str:
    """What the rules chose for a point."""
    comma = ',' * bool(choice.quantizer.kwargs())
    return f'{part_text(choice.quantizer)}{comma} {choice.bits} bit, {part_text(choice.observer)}'


def _value_text(value: Any) -> str:
    """An argument as a recipe has it."""
    if isinstance(value, list | tuple) and len(value) > 4:
        return f'[{_value_text(value[0])} ... {_value_text(value[-1])}]'
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_number(text: str) -> bool:
    return text.replace('.', '', 1).replace('-', '', 1).isdigit()
