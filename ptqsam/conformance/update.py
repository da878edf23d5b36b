"""Changing an expectation in its file: only the numbers and a line of history; comments and order stay as they are."""

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from ptqsam.conformance.expectations import Entry, parse_suite
from ptqsam.errors import ConfigError
from ptqsam.fileio import write_text
from ptqsam.yaml_files import StrictLoader

# digits that are written of a measured number
DIGITS = 4


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
    new = {metric: rounded(value) for metric, value in measured.items()}
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


def rounded(value: Any) -> Any:
    """A number with as many digits as mean something."""
    return float(f'{value:.{DIGITS}g}') if isinstance(value, int | float) and abs(value) < 10**DIGITS else value


def written(value: Any) -> str:
    """A value in the notation of YAML."""
    if isinstance(value, float):
        return f'{value:g}'
    return json.dumps(value, ensure_ascii=False)


def find(node: yaml.Node, *keys: str) -> yaml.Node:
    """The node below others at these keys."""
    for key in keys:
        node = next(value for name, value in node.value if name.value == key)
    return node


def history_edit(text: str, entry: yaml.Node, line: str) -> tuple[int, int, str]:
    """Where a line of history goes, and with what before it: (start, end, words) of what is replaced."""
    history = next((value for key, value in entry.value if key.value == 'history'), None)
    last = list(leaves(entry if history is None else history))[-1].end_mark.index
    end = text.find('\n', last)
    end = len(text) if end < 0 else end
    column = entry.value[0][0].start_mark.column
    head = f'\n{" " * column}history:' if history is None else ''
    return end, end, f'{head}\n{" " * column}{line}'


def leaves(node: yaml.Node) -> Iterator[yaml.Node]:
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
