"""Changing an expectation in its file: only the numbers and a line of history; comments and order stay as they are."""

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ptqsam.conformance.expectations import Entry, parse_suite
from ptqsam.errors import ConfigError
from ptqsam.fileio import write_text
from ptqsam.yaml_files import StrictLoader


def update_entry(path: Path, name: str, measured: dict[str, Any], reason: str) -> dict[str, tuple[Any, Any]]:
    """Write what was measured into the file of expectations, with the reason and the date.

    Args:
        path: the file.
        name: of the entry.
        measured: metric -> value, of all metrics of the entry.
        reason: why the new numbers are right.

    Returns:
        Metric -> expected value before and now, of those that changed; the file is written if there are any.

    Raises:
        ConfigError: the entry is not written in a way that this can change.
    """
    text = path.read_text(encoding='utf-8')
    entry = parse_suite(text, str(path))[name]
    new = {metric: rounded(value, entry.expect[metric].tolerance) for metric, value in measured.items()}
    changes = {m: (entry.expect[m].value, value) for m, value in new.items() if value != entry.expect[m].value}
    if not changes:
        return {}
    root = yaml.compose(text, Loader=StrictLoader)
    places = {metric: find(root, 'entries', name, 'expect', metric, 'value') for metric in changes}
    edits = [(node.start_mark.index, node.end_mark.index, written(changes[m][1])) for m, node in places.items()]
    was = ', '.join(f'{metric}: {written(before)}' for metric, (before, _) in changes.items())
    line = f'- {{date: {date.today()}, reason: {json.dumps(reason, ensure_ascii=False)}, was: {{{was}}}}}'
    edits.append(history_edit(text, find(root, 'entries', name), line))
    for start, end, words in sorted(edits, reverse=True):
        text = text[:start] + words + text[end:]
    demand_changed(text, path, name, entry, changes)
    write_text(path, text)
    return changes


def rounded(value: Any, tolerance: float) -> Any:
    """A number with the digits that its tolerance leaves a meaning, and one more; others are exact."""
    return round(value, max(0, math.ceil(-math.log10(tolerance))) + 1) if tolerance else value


def written(value: Any) -> str:
    """A value in the notation of YAML."""
    return repr(value).removesuffix('.0') if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def find(node: Any, *keys: str) -> Any:
    """The node of YAML below others at these keys."""
    for key in keys:
        node = next(value for name, value in node.value if name.value == key)
    return node


def history_edit(text: str, entry: Any, line: str) -> tuple[int, int, str]:
    """Where a line of history goes, and with what before it: (start, end, words) of what is replaced."""
    history = next((value for key, value in entry.value if key.value == 'history'), None)
    last = list(leaves(entry if history is None else history))[-1].end_mark.index
    end = text.find('\n', last)
    end = len(text) if end < 0 else end
    column = entry.value[0][0].start_mark.column
    head = f'\n{" " * column}history:' if history is None else ''
    return end, end, f'{head}\n{" " * column}{line}'


def leaves(node: Any) -> Iterator[yaml.Node]:
    """Nodes that end where their text ends; a block ends where the next begins, behind comments."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        yield node
        return
    for item in node.value:
        yield from leaves(item[1] if isinstance(item, tuple) else item)


def demand_changed(text: str, path: Path, name: str, entry: Entry, changes: dict[str, tuple[Any, Any]]) -> None:
    """Make sure that a changed text says what it should.

    Raises:
        ConfigError: it does not.
    """
    try:
        new = parse_suite(text, str(path))[name]
    except ConfigError:
        new = entry
    if len(new.history) != len(entry.history) + 1 or any(new.expect[m].value != now for m, (_, now) in changes.items()):
        raise ConfigError(f'{path}: {name}: cannot be changed as it is written; write it as the entries around it')
